// p <- p + weight (z - p), where the gradient is z: what makes parameters others and these again
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Interpolation {
  static constexpr auto name = "interpolation";
  static constexpr Names<0> states{};
  static constexpr auto step_scale = StepScale::kOne;
  FUSEDOPT_SCALARS();
  FUSEDOPT_HYPER(weight);
  FUSEDOPT_COEFFICIENTS(weight);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool) { return {.weight = h.weight}; }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T*, const Coefficients<T>& c) {
    return c.weight * (p - g);
  }
};

FUSEDOPT_REGISTER(Interpolation)

}  // namespace fusedopt
