// LAMB:  u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + wd p ;  d = trust u
//   trust = |p| / |u| over the tensor; 1 where either is 0, or nothing decays and not `always_adapt`
#pragma once

#include "families/adam.h"

namespace fusedopt {

struct LAMB : AdamMoments<false> {
  static constexpr auto name = "lamb";
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(beta1, beta2, eps, weight_decay, always_adapt);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, beta2, one_minus_beta2, m_scale, root_scale, eps, weight_decay, adapts, trust);
  FUSEDOPT_MEASURES(param, update);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = 1 / bias_correction(h.beta1, s.step),
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
        .weight_decay = h.weight_decay,
        .adapts = h.weight_decay != 0 || h.always_adapt != 0 ? 1.0 : 0.0,
        .trust = 1,
    };
  }

  template <class T>
  FUSEDOPT_HD static T update(T p, T g, T* state, const Coefficients<T>& c) {
    const T v = update_moments<false>(g, state, c.one_minus_beta1, c.beta2, c.one_minus_beta2);
    return c.m_scale * state[0] / (c.root_scale * std::sqrt(v) + c.eps) + c.weight_decay * p;
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, T* state, const Coefficients<T>& c) {
    const T u = update(p, g, state, c);
    return {.param = p * p, .update = u * u};
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars&, const Sums<Measures<double>>& m) {
    if (c.adapts != 0 && m.param > 0 && m.update > 0) c.trust = std::sqrt(m.param) / std::sqrt(m.update);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    return c.trust * update(p, g, state, c);
  }
};

FUSEDOPT_REGISTER(LAMB)

}  // namespace fusedopt
