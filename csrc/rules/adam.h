// Adam, AdamW, AMSGrad:  d = m / (1 - b1^t) / (sqrt(w) / sqrt(1 - b2^t) + eps)
#pragma once

#include "families/adam.h"

namespace fusedopt {

template <bool Amsgrad>
struct Adam : AdamRatio<Amsgrad> {
  static constexpr auto name = "adam";
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(beta1, beta2, eps);

  FUSEDOPT_HD static auto prepare(const Hyper& h, Scalars& s, bool) {
    return typename AdamRatio<Amsgrad>::template Coefficients<double>{
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = 1 / bias_correction(h.beta1, s.step),
        .g_scale = 0,
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
    };
  }
};

FUSEDOPT_REGISTER(Adam<false>, Adam<true>)

}  // namespace fusedopt
