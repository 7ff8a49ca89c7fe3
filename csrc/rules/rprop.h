// Rprop:  e <- clamp(e eta, min, max) ;  d = e sign(g), with eta = etaplus where g prev > 0; where g prev < 0, etaminus
// and g <- 0; else 1. As in torch, an element whose gradient is NaN stays where it is.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Rprop {
  static constexpr auto name = "rprop";
  static constexpr Names<2> states{"prev", "step_size"};
  static constexpr auto step_scale = StepScale::kOne;
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(etaminus, etaplus, step_size_min, step_size_max);
  FUSEDOPT_COEFFICIENTS(etaminus, etaplus, step_size_min, step_size_max);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool) {
    return {
        .etaminus = h.etaminus,
        .etaplus = h.etaplus,
        .step_size_min = h.step_size_min,
        .step_size_max = h.step_size_max,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    const T change = g * state[0];
    const T eta = change > T(0) ? c.etaplus : (change < T(0) ? c.etaminus : T(1));
    state[0] = change < T(0) ? T(0) : g;
    state[1] = clamp(state[1] * eta, c.step_size_min, c.step_size_max);
    const T sign = state[0] > T(0) ? T(1) : (state[0] < T(0) ? T(-1) : T(0));
    return state[1] * sign;
  }
};

FUSEDOPT_REGISTER(Rprop)

}  // namespace fusedopt
