// The sum of the squares of all gradients of a device, the same bits every time.
#pragma once

#include "cuda/walk.cuh"

namespace fusedopt::cuda {

__device__ __forceinline__ double square(float x) { return static_cast<double>(x) * x; }

// The element, not counting a head, with which a tile of a row begins.
__device__ __forceinline__ std::int64_t first_of(const Row& row, int tile) {
  return static_cast<std::int64_t>(tile - row.first) * kTile;
}

// Whether a tile has all its elements and can be read 16 bytes at a time.
__device__ __forceinline__ bool is_full(const Row& row, int tile) {
  return row.head >= 0 && row.head + first_of(row, tile) + kTile <= row.numel;
}

// The elements of a tile, and before the first tile of a row its head: [begin, end).
struct Range {
  std::int64_t begin, end;
};
__device__ __forceinline__ Range range_of(const Row& row, int tile) {
  const std::int64_t head = row.head > 0 ? row.head : 0;
  const std::int64_t start = head + first_of(row, tile);
  return {tile == row.first ? 0 : start, min(start + kTile, row.numel)};
}

// The squares of a lane's elements of a full tile.
__device__ __forceinline__ double squares_full(const Row& row, std::int64_t start, Spread mine, DType type) {
  Raw raw;
  float g[kLane];
  fetch(raw, row.address[kGrad], type, start + mine.first, mine.stride);
  widen(g, raw, type);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kLane; ++k) sum += g[k] * g[k];
  if (sum <= 3e38f) return sum;  // else the squares may have overflowed, not the gradients
  double wide = 0;
#pragma unroll
  for (int k = 0; k < kLane; ++k) wide += square(g[k]);
  return wide;
}

// The same, one by one.
__device__ __forceinline__ double squares(const Tables& t, const Row& row, Range range, DType type) {
  double sum = 0;
#pragma unroll 1
  for (std::int64_t i = range.begin + lane_id(); i < range.end; i += 32) {
    const std::int64_t at = row.kind.strided() ? place(t, row, i, kGrad) : i;
    const double g = load_one<double>(row.address[kGrad], type, at);
    sum += g * g;
  }
  return sum;
}

// Writes this block's sum of squares. Every lane adds up its own tiles in their order, then the block its lanes.
template <int Words>
__device__ __forceinline__ void measure(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  const Share mine = share(t);
  double sum = 0;
  int index = mine.first_row;
  for (int tile = mine.begin + warp_id(); tile < mine.end;) {
    index = seek(t, index, tile);
    Row row;
    enter<0>(row, a, index);
    const DType type = row.kind.dtype(kGrad);
    const bool vector = !row.kind.strided() && type != DType::f64;
    row.head = vector ? head_of<kGrad, kGrad>(row) : -1;
    const int end = min(mine.end, row.last);
    if (!row.active) {
      tile += (end - tile + n_warps() - 1) / n_warps() * n_warps();
      continue;
    }
    if (row.head > 0 && tile == row.first) sum += squares(t, row, {0, min(row.numel, std::int64_t{row.head})}, type);
    const Spread spread_of_lane = spread(lane_id(), type != DType::f32);
#pragma unroll 1
    for (; tile < end && is_full(row, tile); tile += n_warps()) {
      sum += squares_full(row, row.head + first_of(row, tile), spread_of_lane, type);
    }
#pragma unroll 1
    for (; tile < end; tile += n_warps()) {
      Range range = range_of(row, tile);
      if (row.head > 0 && tile == row.first) range.begin = row.head;
      sum += squares(t, row, range, type);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) t.partials[blockIdx.x] = sum;
}

}  // namespace fusedopt::cuda
