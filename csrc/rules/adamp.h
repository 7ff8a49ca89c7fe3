// AdamP:  m, v as Adam's ;  d = (m, with Nesterov b1 m + (1 - b1) g) / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps),
//   projected ;  p <- (1 - lr wd r) p - lr d with r = wd_ratio where it was projected, else 1
#pragma once

#include "families/adam.h"
#include "families/projected.h"

namespace fusedopt {

struct AdamP : AdamMoments<false>, Projected {
  static constexpr auto name = "adamp";
  FUSEDOPT_SCALARS(step, n_dims);
  FUSEDOPT_HYPER(beta1, beta2, eps, weight_decay, delta, wd_ratio, nesterov);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, beta2, one_minus_beta2, m_scale, g_scale, root_scale, eps, delta, wd_ratio,
                        pull);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double scale = 1 / bias_correction(h.beta1, s.step);
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = scale * (h.nesterov != 0 ? h.beta1 : 1),
        .g_scale = h.nesterov != 0 ? scale * (1 - h.beta1) : 0,
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
        .delta = h.delta,
        .wd_ratio = h.wd_ratio,
        .pull = h.weight_decay,
    };
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, T* state, const Coefficients<T>& c) {
    return sums(p, g, adam_ratio<false>(g, state, c));
  }

  FUSEDOPT_HD static double score(const Coefficients<double>& c, const Measures<double>& m) { return score_of(c, m); }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    project(c, s.n_dims, m);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    return adam_ratio<false>(g, state, c) + c.pull * p;
  }
};

FUSEDOPT_REGISTER(AdamP)

}  // namespace fusedopt
