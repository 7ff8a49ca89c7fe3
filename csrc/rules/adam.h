// Adam, AdamW, AMSGrad:  d = m / (1 - b1^t) / (sqrt(w) / sqrt(1 - b2^t) + eps)
#pragma once

#include "families/adam.h"

namespace fusedopt {

template <bool Amsgrad>
struct Adam : AdamRatio<Amsgrad> {
  static constexpr auto name = "adam";
  static constexpr Names<1> scalars{"step"};
  static constexpr Names<3> hyper{"beta1", "beta2", "eps"};
  struct Hyper {
    double beta1, beta2, eps;
  };
  struct Scalars {
    double step;
  };
  using Prepared = typename AdamRatio<Amsgrad>::template Coefficients<double>;

  FUSEDOPT_HD static Prepared prepare(const Hyper& h, Scalars& s, bool) {
    const double root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step));
    const double m_scale = 1 / bias_correction(h.beta1, s.step);
    return {1 - h.beta1, h.beta2, 1 - h.beta2, m_scale, 0, root_scale, h.eps};
  }
};

FUSEDOPT_REGISTER(Adam<false>, Adam<true>)

}  // namespace fusedopt
