// The pass that measures: the sum of the squares of all gradients of a device, the same bits every time.
#pragma once

#include "cuda/walk.cuh"

namespace fusedopt::cuda {

__device__ __forceinline__ double square(float x) { return static_cast<double>(x) * x; }

// The squares of a lane's elements of a whole tile.
__device__ __forceinline__ double squares(const float* g) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Whole::kCount; ++i) sum += g[i] * g[i];
  if (sum <= 3e38f) return sum;  // else the squares may have overflowed, not the gradients
  double wide = 0;
#pragma unroll
  for (int i = 0; i < Whole::kCount; ++i) wide += square(g[i]);
  return wide;
}

// Adds the squares of Count whole tiles, in their order, in sums of kNormTiles. All loads are under way before the
// first value is needed, for where the gradient's element is wide or narrow is known to the compiler.
template <bool Halves, int Count>
__device__ __forceinline__ void add_squares(double& sum, const Row<kGrad, kGrad + 1>& row, int tile) {
  const Codec half = row.signature.codec(kGrad) == Codec::bf16 ? Codec::bf16 : Codec::f16;
  const Codec codec = Halves ? half : Codec::f32;
  Whole::Raw raw[Count];
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const Whole at(row.start(tile + i * kForwards), Halves);
    at.fetch(raw[i], row.address[kGrad][0], codec, kGrad);
  }
  double part = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    float g[Whole::kCount];
    decode<Whole>(g, raw[i], codec);
    part += squares(g);
    if ((i + 1) % kNormTiles && i + 1 < Count) continue;
    sum += part;
    part = 0;
  }
}

// The same of `left` whole tiles. Those of narrow elements have half as many loads, so twice as many are read at once.
template <bool Halves>
__device__ __forceinline__ void add_whole(double& sum, const Row<kGrad, kGrad + 1>& row, int tile, int left) {
  constexpr int kMost = Halves && !kHalvesInTwo ? 2 * kNormTiles : kNormTiles;
#pragma unroll 1
  for (; left >= kMost; left -= kMost, tile += kMost * kForwards) add_squares<Halves, kMost>(sum, row, tile);
  if (kMost > kNormTiles && left >= kNormTiles) {
    add_squares<Halves, kNormTiles>(sum, row, tile);
    left -= kNormTiles;
    tile += kNormTiles * kForwards;
  }
#pragma unroll 1
  for (; left > 0; --left, tile += kForwards) add_squares<Halves, 1>(sum, row, tile);
}

// The squares of any range of elements.
__device__ __forceinline__ double squares(const Row<kGrad, kGrad + 1>& row, std::int64_t begin, std::int64_t end) {
  using Fetch = Masked<kGrad, 1, true>;
  const Codec codec = row.signature.codec(kGrad);
  double sum = 0;
#pragma unroll 1
  for (; begin < end; begin += Fetch::kAll) {
    const Fetch at(begin, end, row.layout, row.slice());
    typename Fetch::Raw raw;
    at.fetch(raw, row.address[kGrad][0], codec, kGrad);
    double g[Fetch::kCount];
    decode<Fetch>(g, raw, codec);
#pragma unroll
    for (int i = 0; i < Fetch::kCount; ++i) sum += g[i] * g[i];
  }
  return sum;
}

// Writes the sums of the shares that this block claims. A lane adds up its own tiles in their order, the block its
// lanes: whoever computes a share, the bits are the same. Rows of a rule that adds up may have several segments.
template <bool AddsUp, int Words>
__device__ __forceinline__ void measure(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  each_claim(t.n_shares, t.counts + kSharesMeasured, [&](int number) {
    const Share own = share(t, number);
    double sum = 0;
    const auto add = [&](const auto& row, int first, int count) {
      row.template split<kForwards>(
          first, count, [&](std::int64_t begin, std::int64_t end) { sum += squares(row, begin, end); },
          [&](int tile, int left) {
            if (row.signature.codec(kGrad) == Codec::f32) {
              add_whole<false>(sum, row, tile, left);
            } else {
              add_whole<true>(sum, row, tile, left);
            }
          });
    };
    each_row<kForwards>(t, own.begin, own.end, own.first_row, [&](int index, int first, int count) {
      const Row<kGrad, kGrad + 1> row(a, index);
      if (!row.active) return;
      if constexpr (AddsUp) {
        each_segment<kForwards>(t, row, index, first, count,
                                [&](const auto& r, int, int tile, int n) { add(r, tile, n); });
      } else {
        add(row, first, count);
      }
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) t.partials[number] = sum;
  });
}

}  // namespace fusedopt::cuda
