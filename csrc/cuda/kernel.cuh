// The whole step of all tensors of a device: measure the gradients, meet, decide, update, count.
#pragma once

#include <cooperative_groups.h>

#include "core/step.h"
#include "cuda/norm.cuh"

namespace fusedopt::cuda {

// ----------------------------------------------------------------------------------------------- decide

struct Decision {
  double factor;  // 1 / loss scale * clip coefficient
  double norm;
  bool skipped;
};

// torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), and NaN stays NaN. One thread decides for its
// block.
template <int Words>
__device__ __forceinline__ Decision decide_once(const Arguments<Words>& a, double squared) {
  const double inverse = 1 / static_cast<double>(*a.tables.grad_scale);
  const double max_norm = __longlong_as_double(live(a, kMaxNorm));
  Decision d;
  d.norm = live(a, kMeasured) ? sqrt(squared) * inverse : 0;
  d.skipped = *a.tables.found_inf != 0 || (live(a, kSkip) && !(d.norm < __longlong_as_double(0x7ff0000000000000)));
  const double clip = max_norm / (d.norm + 1e-6);
  d.factor = max_norm == __longlong_as_double(0x7ff0000000000000) || clip > 1 ? inverse : inverse * clip;
  return d;
}

template <int Words>
__device__ __forceinline__ Decision decide(const Arguments<Words>& a, double squared) {
  FUSEDOPT_SHARED(Decision, decision);
  if (threadIdx.x == 0) decision = decide_once(a, squared);
  __syncthreads();
  return decision;
}

// ----------------------------------------------------------------------------------------------- update

// A group's record in the live table.
template <class Rule>
constexpr int kRecord = 2 * (2 + static_cast<int>(Rule::hyper.size())) + 2;

template <int Words>
__device__ __forceinline__ double hyper(const Arguments<Words>& a, int at) {
  const std::int64_t source = live(a, at + 1);
  return source ? load_number(source) : __longlong_as_double(live(a, at));
}

// What the elements of a cohort have in common.
struct Prepared {
  Common<double> common;
  double coefficients[kMaxCoefficients];
};

template <class Rule, int Words>
__device__ __forceinline__ void read_hyper(const Arguments<Words>& a, int record, double* h) {
#pragma unroll
  for (int k = 0; k < static_cast<int>(Rule::hyper.size()); ++k) h[k] = hyper(a, record + 2 * (2 + k));
}

template <class Rule, int Words>
__device__ __forceinline__ void read_scalars(const Arguments<Words>& a, int row, double* s) {
  const std::int64_t* addresses = words(a.tables, row) + kAddresses + 1 + a.tables.max_states;
#pragma unroll
  for (int k = 0; k < static_cast<int>(Rule::scalars.size()); ++k) s[k] = load_number(addresses[k]);
}

template <class Rule, int Words>
__device__ __forceinline__ int record_of(const Arguments<Words>& a, int row) {
  return kHeader + a.tables.n_rows + static_cast<int>(words(a.tables, row)[kGroup]) * kRecord<Rule>;
}

template <class Rule, int Words>
__device__ __forceinline__ Prepared prepare_row(const Arguments<Words>& a, int row, double factor) {
  const int record = record_of<Rule>(a, row), flags = record + kRecord<Rule> - 2;
  const double lr = hyper(a, record), weight_decay = hyper(a, record + 2);
  const bool decoupled = live(a, flags) != 0;
  double h[kMaxHyper], s[kMaxScalars];
  read_hyper<Rule>(a, record, h);
  read_scalars<Rule>(a, row, s);
  if (Rule::scalars.size()) s[0] += 1;
  Prepared p;
  p.common = {factor * static_cast<double>(live(a, flags + 1)), decoupled ? 0 : weight_decay,
              decoupled ? 1 - lr * weight_decay : 1, lr};
  prepare<Rule>(h, s, live(a, kHeader + row) & 1, p.coefficients);
  return p;
}

// Whether two rows have the same hyperparameters and counters; a row without a gradient fits to any.
template <class Rule, int Words>
__device__ __forceinline__ bool same_cohort(const Arguments<Words>& a, int row, int other) {
  const std::int64_t given = live(a, kHeader + row), of_other = live(a, kHeader + other);
  if (!given) return true;
  if (!of_other || (given & 1) != (of_other & 1)) return false;
  if (words(a.tables, row)[kGroup] != words(a.tables, other)[kGroup]) return false;
  double s[kMaxScalars], t[kMaxScalars];
  read_scalars<Rule>(a, row, s);
  read_scalars<Rule>(a, other, t);
  bool same = true;
#pragma unroll
  for (int k = 0; k < static_cast<int>(Rule::scalars.size()); ++k) same &= s[k] == t[k];
  return same;
}

template <class Rule, class T>
struct Ready {
  Common<T> common;
  typename Rule::template Coefficients<T> coefficients;
};

template <class Rule, class T>
__device__ __forceinline__ Ready<Rule, T> ready(const Prepared& p) {
  return {{static_cast<T>(p.common.gradient_factor), static_cast<T>(p.common.coupled_decay),
           static_cast<T>(p.common.keep), static_cast<T>(p.common.lr)},
          cast_coefficients<Rule, T>(p.coefficients)};
}

template <class Rule, class T>
__device__ __forceinline__ void step_one(const Tables& t, const Row& row, std::int64_t element,
                                         const Ready<Rule, T>& r) {
  constexpr int n = static_cast<int>(Rule::states.size());
  std::int64_t at[kFirstState + n];
#pragma unroll
  for (int k = 0; k < kFirstState + n; ++k) at[k] = row.kind.strided() ? place(t, row, element, k) : element;
  T p = load_one<T>(row.address[kParam], row.kind.dtype(kParam), at[kParam]);
  const T g = load_one<T>(row.address[kGrad], row.kind.dtype(kGrad), at[kGrad]);
  T state[n + 1];
#pragma unroll
  for (int k = 0; k < n; ++k) {
    state[k] = load_one<T>(row.address[kFirstState + k], row.kind.dtype(kFirstState + k), at[kFirstState + k]);
  }
  step_element<Rule, T>(p, g, state, r.common, r.coefficients);
  store_one<T>(row.address[kParam], row.kind.dtype(kParam), at[kParam], p);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    store_one<T>(row.address[kFirstState + k], row.kind.dtype(kFirstState + k), at[kFirstState + k], state[k]);
  }
}

// A range one by one.
template <class Rule, class T>
__device__ __forceinline__ void step_range(const Tables& t, const Row& row, Range range, const Ready<Rule, T>& r) {
#pragma unroll 1
  for (std::int64_t i = range.begin + lane_id(); i < range.end; i += 32) step_one<Rule, T>(t, row, i, r);
}

// A lane's eight elements of a full tile: all loads are under way before the first value is needed.
template <class Rule>
__device__ __forceinline__ void step_full(const Row& row, std::int64_t start, Spread mine,
                                          const Ready<Rule, float>& r) {
  constexpr int n = kFirstState + static_cast<int>(Rule::states.size());
  Raw raw[n];
#pragma unroll
  for (int k = 0; k < n; ++k) fetch(raw[k], row.address[k], row.kind.dtype(k), start + mine.first, mine.stride);
  float v[n][kLane];
#pragma unroll
  for (int k = 0; k < n; ++k) widen(v[k], raw[k], row.kind.dtype(k));
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    float state[n - 1];
#pragma unroll
    for (int k = kFirstState; k < n; ++k) state[k - kFirstState] = v[k][i];
    step_element<Rule, float>(v[kParam][i], v[kGrad][i], state, r.common, r.coefficients);
#pragma unroll
    for (int k = kFirstState; k < n; ++k) v[k][i] = state[k - kFirstState];
  }
#pragma unroll
  for (int k = 0; k < n; ++k) {
    if (k == kGrad) continue;
    narrow(raw[k], v[k], row.kind.dtype(k));
    put(raw[k], row.address[k], row.kind.dtype(k), start + mine.first, mine.stride);
  }
}

// The tiles [begin, end) that rows of one cohort have, the last first: the norm has just read the last.
template <class Rule, int Words>
__device__ __forceinline__ void update_tiles(const Arguments<Words>& a, int begin, int end, int index,
                                             const Prepared& prepared) {
  constexpr int n = static_cast<int>(Rule::states.size());
  const Tables& t = a.tables;
  for (int tile = end - 1 - warp_id(); tile >= begin;) {
    index = seek(t, index, tile);
    Row row;
    enter<n>(row, a, index);
    const int low = max(begin, row.first);
    if (!row.active) {
      tile -= (tile - low + n_warps()) / n_warps() * n_warps();
      continue;
    }
    if (row.kind.dtype(kParam) == DType::f64) {
      const Ready<Rule, double> r = ready<Rule, double>(prepared);
#pragma unroll 1
      for (; tile >= low; tile -= n_warps()) step_range<Rule, double>(t, row, range_of(row, tile), r);
      continue;
    }
    const Ready<Rule, float> r = ready<Rule, float>(prepared);
    row.head = row.kind.strided() || row.kind.wide() ? -1 : head_of<kParam, kGrad + n>(row);
#pragma unroll 1
    for (; tile >= low && !is_full(row, tile); tile -= n_warps()) {
      step_range<Rule, float>(t, row, range_of(row, tile), r);
    }
    const Spread mine = spread(lane_id(), row.kind.halves());
    const bool has_head = row.head > 0 && tile >= low && (tile - row.first) % n_warps() == 0 && low == row.first;
#pragma unroll 1
    for (; tile >= low; tile -= n_warps()) step_full<Rule>(row, row.head + first_of(row, tile), mine, r);
    if (has_head) step_range<Rule, float>(t, row, {0, row.head}, r);
  }
}

// Calls with the rule's variant of a number.
template <class Rule, class... More, class Call>
__device__ __forceinline__ void with_variant(int number, Call call) {
  if constexpr (sizeof...(More) == 0) {
    call.template operator()<Rule>();
  } else {
    if (number == 0) {
      call.template operator()<Rule>();
    } else {
      with_variant<More...>(number - 1, call);
    }
  }
}

// A block goes through its share cohort by cohort, from the last row to the first; one thread prepares.
template <int Words, class... Rules>
__device__ __forceinline__ void update(const Arguments<Words>& a, double factor) {
  const Tables& t = a.tables;
  const Share mine = share(t);
  FUSEDOPT_SHARED(Prepared, prepared);
  FUSEDOPT_SHARED(int, other);
  int left = mine.end;
  int row = mine.last_row;
  while (left > mine.begin) {
    row = seek(t, row, left - 1);
    const int variant = t.kinds[words(t, row)[kKind]].variant();
    const int thread = static_cast<int>(threadIdx.x);
    int first = row;  // of the cohort's rows in this share
    bool all = true;
    with_variant<Rules...>(variant, [&]<class Rule>() {
      __syncthreads();
      if (thread == 0 && live(a, kHeader + row)) prepared = prepare_row<Rule>(a, row, factor);
      while (all && first > mine.first_row) {
        if (thread == 0) other = 0;
        __syncthreads();
        const int candidate = first - 1 - thread;
        const bool fits = candidate >= mine.first_row && same_cohort<Rule>(a, candidate, row);
        if (!fits) atomicMax(&other, static_cast<int>(blockDim.x) - thread);
        __syncthreads();
        all = other == 0;
        first -= static_cast<int>(blockDim.x) - other;
        __syncthreads();
      }
      __syncthreads();
      const int begin = max(mine.begin, static_cast<int>(t.tiles[first]));
      update_tiles<Rule>(a, begin, left, row, prepared);
      left = begin;
    });
    row = first > 0 ? first - 1 : 0;
  }
}

// ------------------------------------------------------------------------------------------------ count

// Whether all other blocks of this launch are done; every block asks once. Resets the counter.
__device__ __forceinline__ bool is_last(int* counter) {
  FUSEDOPT_SHARED(bool, last);
  __syncthreads();  // all threads of this block have read what the last block is going to change
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Counts the step in all rows that have a gradient.
template <class Rule, int Words>
__device__ __forceinline__ void advance(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  if constexpr (Rule::scalars.size() > 0) {
    for (int row = static_cast<int>(threadIdx.x); row < t.n_rows; row += static_cast<int>(blockDim.x)) {
      const std::int64_t given = live(a, kHeader + row);
      if (!given) continue;
      double s[kMaxScalars];
      read_scalars<Rule>(a, row, s);
      s[0] += 1;
      if constexpr (Rule::scalars.size() > 1) {  // more than `step`: the rule advances them
        double h[kMaxHyper], c[kMaxCoefficients];
        read_hyper<Rule>(a, record_of<Rule>(a, row), h);
        prepare<Rule>(h, s, given & 1, c);
      }
      const std::int64_t* addresses = words(t, row) + kAddresses + 1 + t.max_states;
      for (int k = 0; k < static_cast<int>(Rule::scalars.size()); ++k) store_number(addresses[k], s[k]);
    }
  }
}

// Blocks on a processor: as many as leave enough registers that nothing is spilled. More states are more loads under
// way in each warp, so that fewer warps do.
template <class Rule, class... More>
constexpr int kBlocks = sizeof...(More)           ? 2
                        : Rule::states.size() > 1 ? 3
                                                  : 4;

// One launch for measuring and updating is cooperative; either alone need not be.
template <int Words, class Rule, class... More>
__global__ void __launch_bounds__(kThreads, kBlocks<Rule, More...>) step(const __grid_constant__ Arguments<Words> a) {
  const Tables& t = a.tables;
  double squared = 0;
  if (t.measure) {
    measure(a);
    if (t.update) {
      cooperative_groups::this_grid().sync();
    } else if (!is_last(t.counters)) {
      return;
    }
    double sum = 0;
    for (int b = static_cast<int>(threadIdx.x); b < static_cast<int>(gridDim.x); b += static_cast<int>(blockDim.x)) {
      sum += __ldcg(t.partials + b);
    }
    squared = block_sum(sum);
    if (threadIdx.x == 0 && (blockIdx.x == 0 || !t.update)) t.verdict[0] = squared;
    if (!t.update) return;
  } else {
    squared = t.verdict[0];
  }
  const Decision d = decide(a, squared);
  if (!d.skipped) update<Words, Rule, More...>(a, d.factor);
  if (!is_last(t.counters)) return;
  if (threadIdx.x == 0) {
    t.verdict[1] = d.norm;
    t.counters[1] += d.skipped;
    t.counters[2] = d.skipped;
  }
  if (!d.skipped) advance<Rule>(a);
}

}  // namespace fusedopt::cuda
