// NAdamW (MLCommons form):  d = (b1 m + (1 - b1) g) / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)
#pragma once

#include "families/adam.h"

namespace fusedopt {

struct NAdamW : AdamRatio<false> {
  static constexpr auto name = "nadamw";
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(beta1, beta2, eps);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double scale = 1 / bias_correction(h.beta1, s.step);
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = h.beta1 * scale,
        .g_scale = (1 - h.beta1) * scale,
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
    };
  }
};

FUSEDOPT_REGISTER(NAdamW)

}  // namespace fusedopt
