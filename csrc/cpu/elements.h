// The loops over elements, whose values are all of the compute type: a rule's step, and what it adds up.
#pragma once

#include "core/operands.h"
#include "core/step.h"
#include "cpu/sum.h"

namespace fusedopt::cpu {

// The first N operands of a rule's rows, and what is the same for all elements: copies, which no store can change.
template <class Rule, class T, int N = kOperands<Rule>>
class Elements {
 public:
  using Coefficients = typename Rule::template Coefficients<T>;

  Elements(T* const* values, const EngineScalars<T>& engine, const Coefficients& coefficients)
      : engine_(engine), coefficients_(coefficients) {
    for (int k = 0; k < N; ++k) streams_[k] = values[k];
  }

  T* const* streams() const { return streams_; }
  void replace_gradient(T* gradient) { streams_[kGrad] = gradient; }
  void leave_param() { streams_[kParam] = streams_[kGrad]; }  // its memory is not read then

  void step(std::int64_t begin, int count) const {
    FUSEDOPT_INDEPENDENT
    for (std::int64_t i = begin; i < begin + count; ++i) {
      States states(*this, i);
      step_element<Rule, T>(param(i), grad(i), states.values, engine_, coefficients_);
      states.put(*this, i);
    }
  }

  void conclude(Found<kEpilogue<Rule>, T>& found, std::int64_t begin, int count) const {
    FUSEDOPT_INDEPENDENT
    for (int lane = 0; lane < count; ++lane) {
      const std::int64_t i = begin + lane;
      States states(*this, i);
      step_element<Rule, T>(param(i), grad(i), states.values, engine_, coefficients_, [&](T g, T d) {
        found.put(lane, Rule::template conclude<T>(param(i), g, d, states.values, coefficients_));
      });
      states.put(*this, i);
    }
  }

  void measure(Found<kMeasures<Rule>, T>& found, std::int64_t begin, int count) const {
    FUSEDOPT_INDEPENDENT
    for (int lane = 0; lane < count; ++lane) {
      const std::int64_t i = begin + lane;
      States states(*this, i);
      found.put(lane, measure_element<Rule, T>(param(i), grad(i), states.values, engine_, coefficients_));
    }
  }

 private:
  static constexpr int kFetched = N - kFirstState;  // states

  struct States {
    States(const Elements& from, std::int64_t i) {
      for (int k = 0; k < kFetched; ++k) values[k] = from.streams_[kFirstState + k][i];
    }
    void put(const Elements& to, std::int64_t i) const {
      for (int k = 0; k < kFetched; ++k) to.streams_[kFirstState + k][i] = values[k];
    }
    T values[kFetched + 1];
  };

  T& param(std::int64_t i) const { return streams_[kParam][i]; }
  T grad(std::int64_t i) const { return streams_[kGrad][i]; }

  T* streams_[N];
  EngineScalars<T> engine_;
  Coefficients coefficients_;
};

// The step of n elements, after which come others up to `last`.
template <class Rule, class T, int N>
void step(const Elements<Rule, T, N>& elements, std::int64_t n, std::int64_t last) {
  each_block<N>(0, n, last, elements.streams(), [&](std::int64_t begin, int count) { elements.step(begin, count); });
}

// Their step, and what the rule concludes added to its sums.
template <class Rule, class T, int N>
void conclude(const Elements<Rule, T, N>& elements, std::int64_t n, std::int64_t last, double* sums) {
  add_up<kEpilogue<Rule>, N>(n, last, elements.streams(), sums, [&](auto& found, std::int64_t begin, int count) {
    elements.conclude(found, begin, count);
  });
}

// What the rule measures of them, added to its sums.
template <class Rule, class T, int N>
void measure(const Elements<Rule, T, N>& elements, std::int64_t n, std::int64_t last, double* sums) {
  add_up<kMeasures<Rule>, N>(n, last, elements.streams(), sums, [&](auto& found, std::int64_t begin, int count) {
    elements.measure(found, begin, count);
  });
}

}  // namespace fusedopt::cpu
