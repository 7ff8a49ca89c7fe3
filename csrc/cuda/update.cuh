// The pass that steps: cohort by cohort, tile by tile.
#pragma once

#include "cuda/cohort.cuh"
#include "cuda/slots.cuh"
#include "cuda/stored.cuh"

namespace fusedopt::cuda {

// ---------------------------------------------------------------------------------------------------------- tiles

template <class Rule>
using RowOf = Row<kParam, kOperands<Rule>>;

// The columns of a strided row's layout: behind the operands there may be the average, what stands beside the
// parameter, and the logical index.
template <class Rule>
constexpr int kColumns = kOperands<Rule> + (kHasOptions<Rule> ? 3 : 0);

template <class Rule>
using LargestOf = Largest<kStates<Rule>>;

// Calls body(fetch, largest) for all that this warp is to fetch of its tiles of a row, see Row::split, whichever way.
// Where a row has blocks of codes and body writes, it is called twice for what is not whole tiles.
template <class Rule, class T, int Step, bool Writes, class Body>
__device__ __forceinline__ void each_fetch(const RowOf<Rule>& row, int first, int count, Body body) {
  constexpr bool is_double = sizeof(T) == 8;
  const auto each_masked = [&]<bool Any>(std::int64_t begin, std::int64_t end) {
    using Fetch = Masked<kParam, kColumns<Rule>, Any>;
    LargestOf<Rule> largest;
#pragma unroll 1
    for (; begin < end; begin += Fetch::kAll) body(Fetch(begin, end, row.layout, row.slice()), largest);
  };
  [[maybe_unused]] const auto each_block = [&](std::int64_t begin, std::int64_t end) {
    using Fetch = Masked<kParam, kColumns<Rule>, true>;
#pragma unroll 1
    for (; begin < end; begin += kBlockElements) {
      const std::int64_t last = min(begin + kBlockElements, end);
      LargestOf<Rule> largest;
#pragma unroll 1
      for (int pass = Writes ? 0 : 1; pass < 2; ++pass) {
        largest.is_first = pass == 0;
#pragma unroll 1
        for (std::int64_t at = begin; at < last; at += Fetch::kAll) {
          body(Fetch(at, last, row.layout, row.slice()), largest);
        }
        if (Writes && largest.is_first) largest.combine();
      }
      if (Writes) put_scales(row, begin / kBlockElements, largest);
    }
  };
  row.template split<Step>(
      first, count,
      [&](std::int64_t begin, std::int64_t end) {
        if constexpr (kHasOptions<Rule> && !is_double) {
          if (row.signature.has(kBlocks)) return each_block(begin, end);
        }
        if (is_double || row.layout || row.signature.has(kWide)) {
          each_masked.template operator()<true>(begin, end);
        } else if constexpr (!is_double) {
          each_masked.template operator()<false>(begin, end);
        }
      },
      [&](int tile, int left) {
        if constexpr (!is_double) {  // of which no tile is whole
          const bool together = row.signature.has(kHalves) || row.signature.has(kBlocks);
          LargestOf<Rule> largest;
#pragma unroll 1
          for (; left > 0; --left, tile += Step) body(Whole(row.start(tile), together), largest);
        }
      });
}

template <class Rule, class Fetch, class T>
using StoredOf = Stored<Fetch, T, kOperands<Rule>, kHasOptions<Rule> && sizeof(T) == 4>;

// Fetches a lane's elements of all operands. Where noise is added to the gradient's, it is unscaled before; returns
// what is left to do for the step.
template <class Rule, class Fetch, class T>
__device__ __forceinline__ EngineScalars<T> fetch_values(StoredOf<Rule, Fetch, T>& stored, const RowOf<Rule>& row,
                                                         const Fetch& at, const EngineScalars<T>& engine,
                                                         const CohortOptions& options) {
  stored.fetch(row, at);
  EngineScalars<T> e = engine;
  if constexpr (kHasOptions<Rule>) {
    if (row.signature.has(kDraws)) {
      add_noise(stored.values[kGrad], e.gradient_factor, row, at, options);
      e.gradient_factor = 1;
    }
  }
  return e;
}

// The step of a lane's elements; adds what the rule concludes of them to sums.
template <class Rule, class T, class Fetch>
__device__ __forceinline__ void step(const RowOf<Rule>& row, const Fetch& at, LargestOf<Rule>& largest,
                                     const CohortCoefficients<Rule, T>& c, const CohortOptions& options, double* sums) {
  constexpr int n = kOperands<Rule>;
  StoredOf<Rule, Fetch, T> stored;
  auto& values = stored.values;
  [[maybe_unused]] std::conditional_t<kHasOptions<Rule>, Averaged<Fetch, T, n>, Nothing> average(row, at, options);
  const EngineScalars<T> e = fetch_values<Rule, Fetch, T>(stored, row, at, c.engine, options);
  Added<T, kEpilogue<Rule>> added;
#pragma unroll
  for (int i = 0; i < Fetch::kCount; ++i) {
    T state[kStates<Rule> + 1];
#pragma unroll
    for (int k = 0; k < kStates<Rule>; ++k) state[k] = values[kFirstState + k][i];
    T& p = values[kParam][i];
    step_element<Rule, T>(p, values[kGrad][i], state, e, c.rule, [&]([[maybe_unused]] T g, [[maybe_unused]] T d) {
      if constexpr (kEpilogue<Rule> > 0) {
        added.add(Rule::template conclude<T>(p, g, d, state, c.rule), at.is_active(i));
      }
    });
#pragma unroll
    for (int k = 0; k < kStates<Rule>; ++k) values[kFirstState + k][i] = state[k];
  }
  if constexpr (kHasOptions<Rule>) {
    if (largest.is_first) return stored.measure(at, largest);
  }
  added.put(sums);
  if constexpr (kHasOptions<Rule>) average.update(values[kParam], row, at);
  stored.put(row, at, options.step, largest);
}

// Calls with the values' type, float or double, and coefficients of it.
template <class Rule, class Call>
__device__ __forceinline__ void with_type(const RowOf<Rule>& row, const CohortCoefficients<Rule, double>& c,
                                          Call call) {
  if (row.signature.codec(kParam) == Codec::f64) {
    call(c);
  } else {
    call(c.template as<float>());
  }
}

// This warp's tiles of [begin, end), which one cohort's rows have, the last first: the norm has just read the last. Of
// rules that conclude they are those of a run.
template <class Rule, int Words>
__device__ __forceinline__ void update_tiles(const Arguments<Words>& a, int begin, int end, int last_row, int run,
                                             const CohortStep<Rule>& of_cohort) {
  constexpr int kStep = kEpilogue<Rule> > 0 ? kBackwardsInRun : kBackwards;
  const Tables& t = a.tables;
  each_row<kStep>(t, begin, end, last_row, [&](int index, int first, int count) {
    using RowType = RowOf<Rule>;
    const RowType row(a, index);
    if (!row.active) return;
    double sums[kEpilogue<Rule> + 1] = {};
    const auto update = [&](const RowType& r, int tile, int n, const CohortCoefficients<Rule, double>& prepared) {
      with_type<Rule>(r, prepared, [&]<class T>(const CohortCoefficients<Rule, T>& c) {
        each_fetch<Rule, T, kStep, true>(r, tile, n, [&](const auto& at, LargestOf<Rule>& largest) {
          step<Rule, T>(r, at, largest, c, of_cohort.options, sums);
        });
      });
    };
    if constexpr (kMeasures<Rule> > 0) {
      each_segment<kStep>(t, row, index, first, count, [&](const RowType& r, int segment, int tile, int n) {
        update(r, tile, n, finished<Rule>(t, index, segment, of_cohort));
      });
    } else {
      update(row, first, count, of_cohort.coefficients);
    }
    put_slot<kEpilogue<Rule>>(t.sums.epilogue_slots, run + index, sums);
  });
}

// ------------------------------------------------------------------------------------------------------------ pass

// Asks for the tile that this warp is to step first, of [begin, end), in L2: a line of 128 bytes for each lane, eight
// of an operand. It does not wait for them, nor for the row that it looks up to do so.
template <class Rule, int Words>
__device__ __forceinline__ void prefetch_tile(const Arguments<Words>& a, int begin, int end, int last_row) {
  constexpr int kLine = 128, kLanes = 8;
  const Tables& t = a.tables;
  const int tile = end - 1 - warp_id(), operand = lane_id() / kLanes;
  if (tile < begin) return;
  const int row = seek(t, last_row, tile);
  const std::int64_t grad = grad_word(a, row), *words = row_words(t, row);
  const std::uint32_t* signature = signature_of(t, row);
  if (!grad || signature[0] & kStrided || operand >= kOperands<Rule>) return;
  const int address = kOperandAddresses + max(operand - 1, 0) * kAddresses;
  const int size = size_of(codec_in(signature + 1, operand)), at = lane_id() % kLanes * kLine;
  const std::int64_t first = (tile - t.tiles[row]) * kTile * size + at;
  if (at < kTile * size && first < words[kNumel] * size) {
    prefetch((operand == kGrad ? grad & ~(kNewState | kNewAverage) : words[address]) + first);
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

// What a block has prepared.
template <class Rule>
__device__ __forceinline__ CohortStep<Rule>& prepared() {
  FUSEDOPT_SHARED(CohortStep<Rule>, of_block);
  return of_block;
}

// A block on its way through cohorts; all of its threads know the same.
template <class Rule, class... More>
struct Cohorts {
  using Key = KeyOf<Rule>;  // variants have the same scalars
  bool has_prepared = false;
  int row, first, begin;  // of the cohort at hand: its last row, its first, and its first tile
  bool is_active;

  // The rule's variant of the row at hand; where there is only one, nothing is read.
  template <class Call>
  __device__ __forceinline__ void with_variant(const Tables& t, Call call) const {
    cuda::with_variant<Rule, More...>(sizeof...(More) ? static_cast<int>(signature_of(t, row)[0] / kVariant) : 0, call);
  }

  // Goes to the cohort that has tile end - 1 of a share, and has one thread prepare what is not yet.
  template <int Words>
  __device__ __forceinline__ void go(const Arguments<Words>& a, const Share& own, int end, int near, double factor) {
    FUSEDOPT_SHARED(Key, prepared_for);
    row = seek(a.tables, near, end - 1);
    with_variant(a.tables, [&]<class Variant>() {
      const Key key(a, row);
      is_active = key.number >= 0;
      first = first_of_cohort(a, key, row, own.first_row);
      begin = max(own.begin, static_cast<int>(a.tables.tiles[first]));
      const bool is_new = is_active && !(has_prepared && key == prepared_for);
      if (kPrefetch && is_new) prefetch_tile<Variant>(a, begin, end, row);
      __syncthreads();  // all know the key, and are done with what was prepared before
      if (is_new && threadIdx.x == 0) {
        prepared_for = key;
        prepared<Variant>() = prepare_cohort<Variant>(a, key, factor);
      }
      has_prepared |= is_new;
    });
  }
};

// Steps the shares that this block claims, the last first, cohort by cohort, and counts the step in rows that are whole
// in a share. meet() says what becomes of the step; the first cohort is prepared before, which needs nothing of it but
// the factor.
template <int Words, class... Rules>
__device__ __forceinline__ const Decision& update(const Arguments<Words>& a, auto meet) {
  const Tables& t = a.tables;
  Cohorts<Rules...> cohorts;
  if (kEarlyPrepare) {
    const Share own = share(t, t.n_shares - 1 - static_cast<int>(blockIdx.x));
    if (own.begin < own.end) cohorts.go(a, own, own.end, own.last_row, 1);
  }
  const Decision& decision = meet();
  if (decision.skipped) return decision;
  if (cohorts.has_prepared && threadIdx.x == 0) {
    cohorts.with_variant(
        t, [&]<class Rule>() { prepared<Rule>().coefficients.engine.gradient_factor *= decision.factor; });
  }
  each_claim(t.n_shares, t.counts + kSharesUpdated, [&](int claim) {
    const Share own = share(t, t.n_shares - 1 - claim);
    int near = own.last_row;
    for (int end = own.end; end > own.begin; end = cohorts.begin) {
      cohorts.go(a, own, end, near, decision.factor);
      __syncthreads();
      near = max(cohorts.first - 1, 0);
      if (!cohorts.is_active) continue;
      cohorts.with_variant(t, [&]<class Rule>() {
        const Run run(own, t.n_shares - 1 - claim);
        const int first = kEpilogue<Rule> > 0 ? max(cohorts.begin, run.begin) : cohorts.begin;
        const int last = kEpilogue<Rule> > 0 ? min(end, run.end) : end;
        update_tiles<Rule>(a, first, last, cohorts.row, run.number, prepared<Rule>());
        count_cohort<Rule>(a, own, cohorts.first, cohorts.row, prepared<Rule>());
      });
    }
  });
  return decision;
}

}  // namespace fusedopt::cuda
