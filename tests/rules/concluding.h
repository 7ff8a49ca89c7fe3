// See ConcludingRule of tests/sum_rules.py.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Concluding {
  static constexpr auto name = "concluding";
  static constexpr Names<1> states{"momentum_buffer"};
  FUSEDOPT_SCALARS(step, length, along);
  FUSEDOPT_HYPER(momentum);
  FUSEDOPT_COEFFICIENTS(momentum, scale);
  FUSEDOPT_EPILOGUE(length, along);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {.momentum = h.momentum, .scale = (1 + std::abs(s.along)) / (1 + s.length) / s.step};
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] = c.momentum * state[0] + c.scale * g;
    return state[0];
  }

  template <class T>
  FUSEDOPT_HD static Epilogue<T> conclude(T p, T g, T d, const T*, const Coefficients<T>&) {
    return {.length = d * d + T(1), .along = d * g + T(0) * p};
  }
};

FUSEDOPT_REGISTER(Concluding)

}  // namespace fusedopt
