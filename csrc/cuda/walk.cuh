// How blocks and warps find their way: rows, tiles, alignment, strides.
#pragma once

#include "cuda/access.cuh"

// A variable that a block's threads share.
#if !defined(FUSEDOPT_SHARED)
#define FUSEDOPT_SHARED(Type, name) __shared__ Type name
#endif

namespace fusedopt::cuda {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }
__device__ __forceinline__ int n_warps() { return static_cast<int>(blockDim.x) >> 5; }

// The live table, wherever it is.
template <int Words>
__device__ __forceinline__ std::int64_t live(const Arguments<Words>& a, int i) {
  return a.tables.live ? a.tables.live[i] : a.live[i];
}

// A block's tiles [begin, end), the row of the first, and a row not before the last.
// There are fewer than 2^31 tiles.
struct Share {
  int begin, end, first_row, last_row;
};
__device__ __forceinline__ Share share(const Tables& t) {
  const std::int64_t* mine = t.shares + 2 * static_cast<std::int64_t>(blockIdx.x);
  return {static_cast<int>(mine[0]), static_cast<int>(mine[2]), static_cast<int>(mine[1]), static_cast<int>(mine[3])};
}

// A row as a warp knows it while it goes through its tiles.
struct Row {
  int index = -1;
  int first = 0, last = 0;  // tiles
  std::int64_t numel = 0;
  std::int64_t address[kMaxOperands];
  Kind kind{};
  std::int64_t layout = 0;
  int head = -1;  // elements before all operands are aligned; negative if they never are
  bool active = false;
};

__device__ __forceinline__ const std::int64_t* words(const Tables& t, int row) {
  return t.rows + static_cast<std::int64_t>(row) * t.width;
}

// The row of a tile: at or after `row` if the tile is, else before it. All lanes look at once.
__device__ __forceinline__ int seek(const Tables& t, int row, int tile) {
  const int lane = lane_id();
  for (;;) {
    const int next = row + 1 + lane;
    const int passed = __popc(__ballot_sync(kAll, next <= t.n_rows && t.tiles[next] <= tile));
    row += passed;
    if (passed < 32) break;
  }
  for (;;) {
    const int before = row - lane;
    const int behind = __popc(__ballot_sync(kAll, before >= 0 && t.tiles[before] > tile));
    row -= behind;
    if (behind < 32) break;
  }
  return row;
}

// How many elements to step one by one until operands first to last are all at multiples of 16 bytes; -1: they never
// are.
template <int First, int Last>
__device__ __forceinline__ int head_of(const Row& row) {
#pragma unroll 1
  for (int head = 0; head < kLane; ++head) {
    bool aligned = true;
#pragma unroll
    for (int k = First; k <= Last; ++k) aligned &= ((row.address[k] + head * size_of(row.kind.dtype(k))) & 15) == 0;
    if (aligned) return head;
  }
  return -1;
}

template <int States, int Words>
__device__ __forceinline__ void enter(Row& row, const Arguments<Words>& a, int index) {
  const Tables& t = a.tables;
  const std::int64_t* w = words(t, index);
  const std::int64_t given = live(a, kHeader + index);
  row.index = index;
  row.first = static_cast<int>(t.tiles[index]);
  row.last = static_cast<int>(t.tiles[index + 1]);
  row.numel = w[kNumel];
  row.kind = t.kinds[w[kKind]];
  row.layout = w[kLayout];
  row.active = given != 0;
  row.address[kParam] = w[kAddresses];
  row.address[kGrad] = given & ~std::int64_t{1};
#pragma unroll
  for (int k = 0; k < States; ++k) row.address[kFirstState + k] = w[kAddresses + 1 + k];
}

// element / size, for elements below 2^52: an integer division of 64 bits would be a call.
__device__ __forceinline__ std::int64_t quotient(std::int64_t element, std::int64_t size) {
  std::int64_t q = static_cast<std::int64_t>(static_cast<double>(element) * __drcp_rn(static_cast<double>(size)));
  const std::int64_t rest = element - q * size;
  return rest < 0 ? q - 1 : rest >= size ? q + 1 : q;
}

// The offset of an element, in the parameter's order, in an operand of a strided row. A layout is the number of
// dimensions, and for each, innermost first, its size and every operand's stride.
__device__ __forceinline__ std::int64_t place(const Tables& t, const Row& row, std::int64_t element, int operand) {
  const std::int64_t* layout = t.layouts + row.layout;
  const int n_operands = kFirstState + row.kind.n_states();
  std::int64_t offset = 0;
#pragma unroll 1
  for (std::int64_t d = 0, n = layout[0]; d < n; ++d) {
    const std::int64_t* dim = layout + 1 + d * (1 + n_operands);
    const std::int64_t outer = quotient(element, dim[0]);
    offset += (element - outer * dim[0]) * dim[1 + operand];
    element = outer;
  }
  return offset;
}

// The sum over a block, added in the same order every time; every thread has it.
__device__ __forceinline__ double block_sum(double value) {
  struct Sums {
    double of_warp[kThreads / 32];
  };
  FUSEDOPT_SHARED(Sums, sums);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(kAll, value, offset);
  __syncthreads();
  if (lane_id() == 0) sums.of_warp[warp_id()] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < n_warps(); ++w) sum += sums.of_warp[w];
  return sum;
}

}  // namespace fusedopt::cuda
