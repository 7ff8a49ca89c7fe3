// NAdamW (MLCommons form):  d = (b1 m + (1 - b1) g) / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)
#pragma once

#include "families/adam.h"

namespace fusedopt {

struct NAdamW : AdamRatio<false> {
  static constexpr auto name = "nadamw";
  static constexpr Names<1> scalars{"step"};
  static constexpr Names<3> hyper{"beta1", "beta2", "eps"};
  struct Hyper {
    double beta1, beta2, eps;
  };
  struct Scalars {
    double step;
  };

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step));
    const double scale = 1 / bias_correction(h.beta1, s.step);
    return {1 - h.beta1, h.beta2, 1 - h.beta2, h.beta1 * scale, (1 - h.beta1) * scale, root_scale, h.eps};
  }
};

FUSEDOPT_REGISTER(NAdamW)

}  // namespace fusedopt
