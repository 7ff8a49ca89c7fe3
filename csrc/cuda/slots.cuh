// Where warps put what they add up: a slot for each run of a share and each segment that meet.
#pragma once

#include "cuda/walk.cuh"

namespace fusedopt::cuda {

// A warp's tiles of a share, where it adds up: neighbours, so that along a plan's tiles either the run or the segment
// is another from slot to slot.
struct Run {
  int number, begin, end;

  __device__ __forceinline__ Run(const Share& share, int share_number)
      : number(share_number * kRunsPerShare + warp_id()) {
    const int tiles = (share.end - share.begin + kRunsPerShare - 1) / kRunsPerShare;
    begin = min(share.begin + warp_id() * tiles, share.end);
    end = min(begin + tiles, share.end);
  }
};

// What a lane adds up of a few elements in their own type, before it is added in double.
template <class T, int N>
struct Added {
  T sums[N + 1] = {};

  template <class Fields>
  __device__ __forceinline__ void add(const Fields& fields, bool is_active) {
    static_assert(sizeof(Fields) == N * sizeof(T));
    T values[N + 1];
    __builtin_memcpy(values, &fields, sizeof(Fields));
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] += is_active ? values[k] : T(0);
  }

  __device__ __forceinline__ void put(double* to) const {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] += sums[k];
  }
};

// Puts a warp's sums of N things into a slot.
template <int N>
__device__ __forceinline__ void put_slot([[maybe_unused]] double* slots, [[maybe_unused]] int slot,
                                         [[maybe_unused]] const double* sums) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const double sum = warp_sum(sums[k]);
    if (lane_id() == 0) slots[static_cast<std::int64_t>(slot) * N + k] = sum;
  }
}

// The share, from `first` to `last`, that has a tile.
__device__ __forceinline__ int share_of(const Tables& t, int first, int last, int tile) {
#pragma unroll 1
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (t.shares[2 * static_cast<std::int64_t>(middle)] <= tile) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// Tiles that are added up together, the shares that have them, and the number of their segment or row.
struct Unit {
  int begin = 0, end = 0, first_share = 0, last_share = -1, number = 0;

  Unit() = default;
  __device__ __forceinline__ Unit(const Tables& t, int row, int begin, int end, int number)
      : begin(begin), end(end), number(number) {
    if (begin == end) return;
    const int first = static_cast<int>(sums_of(t, row)[kFirstShare]),
              last = static_cast<int>(sums_of(t, row)[kLastShare]);
    first_share = share_of(t, first, last, begin);
    last_share = share_of(t, first_share, last, end - 1);
  }
};

// Adds a unit's slots of one share.
template <int N>
__device__ __forceinline__ void add_slots(const Tables& t, const double* slots, const Unit& unit, int number,
                                          double* sums) {
  const Share own = share(t, number);
  const int tiles = (own.end - own.begin + kRunsPerShare - 1) / kRunsPerShare;
  const int first = (max(unit.begin, own.begin) - own.begin) / tiles;
  const int last = (min(unit.end, own.end) - 1 - own.begin) / tiles;
  for (int run = first; run <= last; ++run) {
    const double* slot = slots + static_cast<std::int64_t>(number * kRunsPerShare + run + unit.number) * N;
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] += __ldcg(slot + k);
  }
}

// Adds up the slots of 32 units, one of each lane, and calls put(sums) in every lane. A long one is the whole warp's.
template <int N, class Put>
__device__ __forceinline__ void add_units(const Tables& t, const double* slots, const Unit& unit, Put put) {
  constexpr int kShort = 4;  // shares. Untested
  double sums[N] = {};
  const int n = unit.last_share - unit.first_share + 1;
  if (n <= kShort) {
    for (int k = 0; k < n; ++k) add_slots<N>(t, slots, unit, unit.first_share + k, sums);
  }
#pragma unroll 1
  for (unsigned left = __ballot_sync(kAll, n > kShort); left; left &= left - 1) {
    const int lane = __ffs(static_cast<int>(left)) - 1;
    Unit theirs;
    theirs.begin = __shfl_sync(kAll, unit.begin, lane);
    theirs.end = __shfl_sync(kAll, unit.end, lane);
    theirs.number = __shfl_sync(kAll, unit.number, lane);
    const int first = __shfl_sync(kAll, unit.first_share, lane), last = __shfl_sync(kAll, unit.last_share, lane);
    double own[N] = {};
#pragma unroll 1
    for (int number = first + lane_id(); number <= last; number += 32) add_slots<N>(t, slots, theirs, number, own);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double sum = __shfl_sync(kAll, warp_sum(own[k]), 0);
      if (lane_id() == lane) sums[k] = sum;
    }
  }
  put(sums);
}

}  // namespace fusedopt::cuda
