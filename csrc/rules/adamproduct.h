// Adam with betas of each step's own:  d = m / (1 - prod b1) / (sqrt(w) / sqrt(1 - prod b2) + eps)
//   One minus a product is what is kept:  c <- b c + (1 - b).
#pragma once

#include "families/adam.h"

namespace fusedopt {

template <bool Amsgrad>
struct AdamProduct : AdamRatio<Amsgrad> {
  static constexpr auto name = "adamproduct";
  FUSEDOPT_SCALARS(step, correction1, correction2);
  FUSEDOPT_HYPER(beta1, beta2, eps);

  // After this step. What was not kept before was Adam's.
  FUSEDOPT_HD static double advanced(double correction, double beta, double step) {
    if (correction == 0 && step > 1) correction = bias_correction(beta, step - 1);
    return beta * correction + (1 - beta);
  }

  FUSEDOPT_HD static auto prepare(const Hyper& h, Scalars& s, bool) {
    s.correction1 = advanced(s.correction1, h.beta1, s.step);
    s.correction2 = advanced(s.correction2, h.beta2, s.step);
    return typename AdamRatio<Amsgrad>::template Coefficients<double>{
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = 1 / s.correction1,
        .g_scale = 0,
        .root_scale = 1 / std::sqrt(s.correction2),
        .eps = h.eps,
    };
  }
};

FUSEDOPT_REGISTER(AdamProduct<false>, AdamProduct<true>)

}  // namespace fusedopt
