// Kernels of the rules that are compiled into this engine build, found by name and states.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/average.h"
#include "cpu/elements.h"
#include "cpu/noise.h"
#include "cpu/packed.h"
#include "cpu/tile.h"

namespace fusedopt::cpu {

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

template <class Rule>
EngineScalars<double> engine_scalars_of(double factor, const Cohort& cohort) {
  return engine_scalars<Rule>(factor * cohort.sign, cohort.lr, cohort.weight_decay, cohort.is_decoupled,
                              cohort.is_cautious);
}

// Calls body(elements, count, last) for each tile of a segment, of which the first N operands are fetched in the
// compute type T; where they are not fetched, memory goes on up to `last`. What the engine does besides the rule is
// done here.
template <class Rule, class T, int N, class Body>
void each_tile_as(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients, bool writes,
                  Body body) {
  const Row& row = segment.row;
  const StepOptions& options = cohort.options;
  const bool draws = row.drawing && options.noise != 0, averages = writes && options.averages;
  EngineScalars<T> e = engine_scalars_of<Rule>(factor, cohort).template as<T>();
  const T gradient_factor = e.gradient_factor;
  std::optional<Noise> noise;
  if (draws) {
    noise.emplace(options, *row.drawing);
    e.gradient_factor = 1;
  }
  const auto c = cast_coefficients<Rule, T>(coefficients);
  Tile<T, kParam, N + 1> tile(row, N + averages, options.step);
  std::int64_t size = tile.size();
  if (kAddsUp<Rule>) size = kTile;  // however they are stored: the same values have the same sums
  if (draws || averages) size = row.slice ? kBlockElements : kShortTile;
  each_tile(segment, size, [&](std::int64_t begin, std::int64_t count) {
    const std::int64_t last = tile.is_in_place() ? segment.last - begin : 0;  // what else is to come is asked for
    T* const* const values = tile.fetch(begin, count);
    Elements<Rule, T, N> elements(values, e, c);
    alignas(kLine) T noisy[kBlockElements];
    if (noise) {
      add_noise(noisy, values[kGrad], gradient_factor, *noise, begin, count);
      elements.replace_gradient(noisy);
    }
    body(elements, count, last);
    if (averages) average(values[kParam], values[N], static_cast<T>(options.weight), options.puts_back, count, last);
    if (writes) tile.put(begin, count);
  });
}

template <class Rule, int N, class Body>
void each_tile_of(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients, bool writes,
                  Body body) {
  const bool is_wide = segment.row.codecs[kParam] == Codec::f64;
  const auto call = is_wide ? each_tile_as<Rule, double, N, Body> : each_tile_as<Rule, float, N, Body>;
  call(segment, factor, cohort, coefficients, writes, body);
}

template <class Rule>
void update_by_tiles(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients,
                     [[maybe_unused]] double* epilogue) {
  each_tile_of<Rule, kOperands<Rule>>(segment, factor, cohort, coefficients, /*writes=*/true,
                                      [&](const auto& elements, std::int64_t n, std::int64_t last) {
                                        if constexpr (kEpilogue<Rule> > 0) {
                                          conclude(elements, n, last, epilogue);
                                        } else {
                                          step(elements, n, last);
                                        }
                                      });
}

// Blocks in registers, and what is between them by tiles.
template <class Rule, States S>
void update_packed(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients) {
  const Row& row = segment.row;
  const auto e = engine_scalars_of<Rule>(factor, cohort).template as<float>();
  const auto c = cast_coefficients<Rule, float>(coefficients);
  for (std::int64_t begin = segment.begin; begin < segment.end;) {
    const std::int64_t left = row.slice > 0 ? row.slice - begin % row.slice : segment.end - begin;
    const std::int64_t end = std::min(begin + left, segment.end);
    for (; end - begin >= kBlockElements; begin += kBlockElements) {
      step_block<Rule, S>(row, begin, e, c, cohort.options.step);
    }
    if (begin < end) update_by_tiles<Rule>({row, begin, end, segment.last}, factor, cohort, coefficients, nullptr);
    begin = end;
  }
}

// The body of the pass that steps.
template <class Rule>
void update(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients, double* epilogue) {
  if constexpr (kEpilogue<Rule> == 0 && kOperands<Rule> > kFirstState && kBytes > 16) {  // short vectors gain nothing
    const bool draws = segment.row.drawing && cohort.options.noise != 0;
    const States states = draws || cohort.options.averages ? States::others : packed_states(segment.row);
    if (states == States::halves) return update_packed<Rule, States::halves>(segment, factor, cohort, coefficients);
    if (states == States::codes) return update_packed<Rule, States::codes>(segment, factor, cohort, coefficients);
  }
  update_by_tiles<Rule>(segment, factor, cohort, coefficients, epilogue);
}

// That of the pass that measures.
template <class Rule>
void measure(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients,
             double* measures) {
  constexpr int read = kMeasuresStates<Rule> ? kOperands<Rule> : kFirstState;
  const bool needs_param = measures_param<Rule>(coefficients) || (!cohort.is_decoupled && cohort.weight_decay != 0);
  each_tile_of<Rule, read>(segment, factor, cohort, coefficients, /*writes=*/false,
                           [&](auto& elements, std::int64_t n, std::int64_t last) {
                             if (!needs_param) elements.leave_param();
                             measure(elements, n, last, measures);
                           });
}

template <class Rule>
constexpr Kernel kernel_of() {
  Kernel kernel{names_of<Rule>, prepare<Rule>, update<Rule>, nullptr, nullptr, nullptr};
  if constexpr (kMeasures<Rule> > 0) {
    kernel.measure = measure<Rule>;
    kernel.finish = finish<Rule>;
    if constexpr (kHasScore<Rule>) kernel.score = score<Rule>;
  }
  return kernel;
}

template <class... Rules>
bool add_kernels() {
  (kernels().push_back(kernel_of<Rules>()), ...);
  return true;
}

}  // namespace fusedopt::cpu
