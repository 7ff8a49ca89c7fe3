// How blocks and warps find their way: shares, rows, and the elements of their tiles.
#pragma once

#include "core/philox.h"
#include "cuda/tile.cuh"

// A variable that a block's threads share.
#if !defined(FUSEDOPT_SHARED)
#define FUSEDOPT_SHARED(Type, name) __shared__ Type name
#endif

namespace fusedopt::cuda {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

// A word of the step table, wherever it is.
template <int Words>
__device__ __forceinline__ std::int64_t step_word(const Arguments<Words>& a, int i) {
  return a.tables.step_table ? a.tables.step_table[i] : a.step_table[i];
}

template <int Words>
__device__ __forceinline__ std::int64_t grad_word(const Arguments<Words>& a, int row) {
  return step_word(a, kGrads + row);
}

__device__ __forceinline__ const std::int64_t* row_words(const Tables& t, int row) {
  return t.rows + static_cast<std::int64_t>(row) * t.width;
}

// --------------------------------------------------------------------------------------------------------- shares

// The tiles [begin, end), the row of the first, and a row not before the last. There are fewer than 2^31 tiles.
struct Share {
  int begin, end, first_row, last_row;
};
__device__ __forceinline__ Share share(const Tables& t, int number) {
  const std::int64_t* words = t.shares + 2 * static_cast<std::int64_t>(number);
  return {static_cast<int>(words[0]), static_cast<int>(words[2]), static_cast<int>(words[1]),
          static_cast<int>(words[3])};
}

// Calls body(claim) for numbers below `count` that this block is the first to claim: its own, then the next ones. The
// next is asked for while one is worked on.
template <class Body>
__device__ __forceinline__ void each_claim(int count, int* claims, Body body) {
  FUSEDOPT_SHARED(int, claimed);
  for (int claim = static_cast<int>(blockIdx.x); claim < count;) {
    int next = static_cast<int>(gridDim.x);
    if (threadIdx.x == 0 && next < count) next += atomicAdd(claims, 1);
    body(claim);
    if (threadIdx.x == 0) claimed = next;
    __syncthreads();
    claim = claimed;
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------------------------------------- rows

// The row of a tile, looked for from `row` on, both ways: all lanes at once, and without a wait between the ways.
__device__ __forceinline__ int seek(const Tables& t, int row, int tile) {
  for (int moved = 32; moved == 32 || moved == -32; row += moved) {
    const int next = row + 1 + lane_id(), before = row - lane_id();
    const std::int64_t of_next = next <= t.n_rows ? t.tiles[next] : INT64_MAX;
    const std::int64_t of_before = before >= 0 ? t.tiles[before] : 0;
    const int passed = __popc(__ballot_sync(kAll, of_next <= tile)),
              behind = __popc(__ballot_sync(kAll, of_before > tile));
    moved = passed - behind;  // one of which is 0
  }
  return row;
}

// The words of a row's signature.
__device__ __forceinline__ const std::uint32_t* signature_of(const Tables& t, int row) {
  return t.signatures + row_words(t, row)[kSignature] * (1 + codec_words(kFirstState + t.n_states));
}

// Some of a warp's tiles: every kWarps-th of a row, or in a run every one, `count` of them from `first` on; backwards
// where Step is negative.
constexpr int kForwards = kWarps;
constexpr int kBackwards = -kWarps;
constexpr int kBackwardsInRun = -1;
template <int Step>
constexpr int kStride = Step > 0 ? Step : -Step;

// Calls body(row, first, count) for this warp's tiles in [begin, end), row by row. `row` is where to look first.
template <int Step, class Body>
__device__ __forceinline__ void each_row(const Tables& t, int begin, int end, int row, Body body) {
  const int own = kStride<Step> == 1 ? 0 : warp_id();
  int tile = Step > 0 ? begin + own : end - 1 - own;
  while (begin <= tile && tile < end) {
    row = seek(t, row, tile);
    const int left = Step > 0 ? min(end, static_cast<int>(t.tiles[row + 1])) - tile
                              : tile + 1 - max(begin, static_cast<int>(t.tiles[row]));
    const int count = (left + kStride<Step> - 1) / kStride<Step>;
    body(row, tile, count);
    tile += count * Step;
  }
}

// A row as a warp knows it: N operands, of which those from First on are used.
template <int First, int N>
struct Row {
  int first_tile;
  bool active;
  std::int64_t origin = 0, numel;  // where its elements begin and end; of a segment, those that `at` went to
  std::int64_t address[N][kAddresses];
  std::int64_t average;  // the address of its average, where it has one
  const std::int64_t* words;
  Signature<N + 1> signature;
  const std::int64_t* layout;  // null where all operands are dense
  int head;                    // elements before all operands are aligned; negative if they never are

  template <int Words>
  __device__ __forceinline__ Row(const Arguments<Words>& a, int row) {
    const Tables& t = a.tables;
    words = row_words(t, row);
    const std::int64_t grad = grad_word(a, row);
    first_tile = static_cast<int>(t.tiles[row]);
    active = grad != 0;
    numel = words[kNumel];
    const std::uint32_t* s = signature_of(t, row);
    signature.flags = s[0];
#pragma unroll
    for (int k = 0; k < codec_words(N + 1); ++k) {
      if (codec_words(N + 1) == codec_words(N) || k < codec_words(kFirstState + t.n_states)) {
        signature.codecs[k] = s[1 + k];
      }
    }
    layout = signature.has(kStrided) ? t.layouts + words[kLayout] : nullptr;
    address[kGrad][0] = grad & ~(kNewState | kNewAverage);
#pragma unroll
    for (int k = First; k < N; ++k) {
      if (k == kGrad) continue;
#pragma unroll
      for (int j = 0; j < kAddresses; ++j) {
        address[k][j] = words[kOperandAddresses + (k ? k - 1 : 0) * kAddresses + j];
      }
    }
    average = 0;
    if constexpr (First == kParam) {
      if (t.n_options && signature.has(kHasAverage)) average = words[kOperandAddresses + (N - 1) * kAddresses];
    }
    head = find_head();
  }

  // What is drawn by, of a stream from its own on.
  __device__ __forceinline__ Draw draw(std::uint32_t seed, std::uint32_t step, std::uint32_t stream = 0) const {
    const auto of_row = static_cast<std::uint64_t>(words[kDraw]);
    return {seed, static_cast<std::uint32_t>(of_row >> 32) + stream, static_cast<std::uint32_t>(of_row), step};
  }

  // Columns of a layout behind those of the rule's operands, of which the average's is the first.
  __device__ __forceinline__ int partner_column() const { return signature.has(kHasAverage); }
  __device__ __forceinline__ int index_column() const { return partner_column() + signature.has(kPartner); }

  // How many elements slices have, where they are padded.
  __device__ __forceinline__ std::int64_t slice() const { return signature.has(kPadded) ? words[kSlice] : 0; }

  // How many elements to step one by one until all operands are at multiples of 16 bytes.
  __device__ __forceinline__ int find_head() const {
    if (layout) return -1;
#pragma unroll 1
    for (int elements = 0; elements < Whole::kCount; ++elements) {
      bool aligned = true;
#pragma unroll
      for (int k = First; k < N; ++k) {
        const Codec codec = signature.codec(k);
        aligned &= codec != Codec::f64 && ((address[k][0] + (origin + elements) * size_of(codec)) & 15) == 0;
      }
      if (First == kParam && signature.has(kPartner)) {
        const int size = partner_size(signature.codec(kParam));
        aligned &= ((address[kParam][1] + (origin + elements) * size) & 15) == 0;
      }
      if (average) aligned &= ((average + (origin + elements) * size_of(signature.codec(N))) & 15) == 0;
      if (aligned) return elements;
      if (signature.has(kBlocks)) break;
    }
    return -1;
  }

  // The element with which a tile begins.
  __device__ __forceinline__ std::int64_t start(int tile) const {
    return origin + max(head, 0) + static_cast<std::int64_t>(tile - first_tile) * kTile;
  }

  // One of its segments, which is walked like a row.
  __device__ __forceinline__ Row at(int segment, int tiles, std::int64_t length) const {
    Row r = *this;
    r.first_tile += segment * tiles;
    r.origin = segment * length;
    r.numel = r.origin + length;
    r.head = r.find_head();
    return r;
  }

  // Calls masked(begin, end) for the elements of a warp's tiles that are not whole, and of the head with the first of
  // all; then whole(first, count) for its whole tiles.
  template <int Step, class Masked, class Whole>
  __device__ __forceinline__ void split(int first, int count, Masked masked, Whole whole) const {
    const int at = first - first_tile;
    const int n = head < 0 ? 0 : static_cast<int>((numel - origin - head) / kTile);  // whole tiles come first
    const int near = (Step > 0 ? max(n - at, 0) : max(at + 1 - n, 0)) + kStride<Step> - 1;
    const int n_near = min(near / kStride<Step>, count);  // whole ones forwards, others backwards
    const int n_whole = Step > 0 ? n_near : count - n_near;
    const int first_whole = Step > 0 ? first : first + n_near * Step;
    const int first_masked = Step > 0 ? first + n_near * Step : first;
    const int nearest = Step > 0 ? at : at + (count - 1) * Step;
#pragma unroll 1
    for (int i = head > 0 && nearest == 0 ? -1 : 0; i < count - n_whole; ++i) {
      const std::int64_t begin = i < 0 ? origin : start(first_masked + i * Step);
      const std::int64_t end = i < 0 ? min(origin + head, numel) : min(begin + kTile, numel);
      masked(begin, end);
    }
    whole(first_whole, n_whole);
  }
};

// The sum over a warp, added in the same order every time; the first lane has it.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(kAll, value, offset);
  return value;
}

// Where a row's sums go.
__device__ __forceinline__ const std::int64_t* sums_of(const Tables& t, int row) {
  return t.sums.row_sums + static_cast<std::int64_t>(row) * static_cast<int>(sums_words.size());
}

__device__ __forceinline__ int segments_of(const Tables& t, int row) {
  return static_cast<int>(sums_of(t, row + 1)[kFirstSegment] - sums_of(t, row)[kFirstSegment]);
}

// Calls body(row, segment, first, count) for the segments that some of a warp's tiles of a row are in, each as a row.
template <int Step, class Row, class Body>
__device__ __forceinline__ void each_segment(const Tables& t, const Row& row, int index, int first, int count,
                                             Body body) {
  const std::int64_t* words = sums_of(t, index);
  const int n = segments_of(t, index), tiles = static_cast<int>((t.tiles[index + 1] - row.first_tile) / max(n, 1));
#pragma unroll 1
  while (count > 0) {
    const int at = first - row.first_tile, k = n > 1 ? at / tiles : 0, inside = at - k * tiles;
    const int here = n > 1 ? min(count, (Step > 0 ? tiles - 1 - inside : inside) / kStride<Step> + 1) : count;
    body(n > 1 ? row.at(k, tiles, words[kSegmentLength]) : row, static_cast<int>(words[kFirstSegment]) + k, first,
         here);
    first += here * Step;
    count -= here;
  }
}

// What a block's warps have, in the first lane of each, combined in their order; every thread has it.
template <class Combine>
__device__ __forceinline__ double block_combined(double value, Combine combine) {
  struct Values {
    double of_warp[kWarps];
  };
  FUSEDOPT_SHARED(Values, values);
  __syncthreads();
  if (lane_id() == 0) values.of_warp[warp_id()] = value;
  __syncthreads();
  double all = values.of_warp[0];
  for (int w = 1; w < kWarps; ++w) all = combine(all, values.of_warp[w]);
  return all;
}

__device__ __forceinline__ double block_sum(double value) {
  return block_combined(warp_sum(value), [](double a, double b) { return a + b; });
}

__device__ __forceinline__ double block_max(double value) {
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  for (int offset = 16; offset > 0; offset /= 2) value = larger(value, __shfl_down_sync(kAll, value, offset));
  return block_combined(value, larger);
}

}  // namespace fusedopt::cuda
