// RAdam (torch form), with r_inf = 2 / (1 - b2) - 1 and r_t = r_inf - 2 t b2^t / (1 - b2^t):
//   r_t > 5:  d = m / (1 - b1^t) rect sqrt(1 - b2^t) / (sqrt(v) + eps)      else:  d = m / (1 - b1^t)
//   rect = sqrt((r_t - 4) (r_t - 2) r_inf / ((r_inf - 4) (r_inf - 2) r_t))
#pragma once

#include "families/adam.h"

namespace fusedopt {

struct RAdam : AdamMoments<false> {
  static constexpr auto name = "radam";
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(beta1, beta2, eps);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, beta2, one_minus_beta2, m_scale, rectified, eps);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double correction2 = bias_correction(h.beta2, s.step);
    const double limit = 2 / (1 - h.beta2) - 1;
    const double rho = limit - 2 * s.step * (1 - correction2) / correction2;
    double m_scale = 1 / bias_correction(h.beta1, s.step);
    const bool rectified = rho > 5;
    if (rectified) {
      const double variance = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho);
      m_scale *= std::sqrt(variance * correction2);
    }
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = m_scale,
        .rectified = rectified ? 1.0 : 0.0,
        .eps = h.eps,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    const T v = update_moments<false>(g, state, c.one_minus_beta1, c.beta2, c.one_minus_beta2);
    const T root = c.rectified != T(0) ? std::sqrt(v) + c.eps : T(1);
    return c.m_scale * state[0] / root;
  }
};

FUSEDOPT_REGISTER(RAdam)

}  // namespace fusedopt
