// AMAdamW:  v <- b2 v + (1 - b2) g^2 ;  P = (1 - b_max prod b) (sqrt(v / (1 - b2^t)) + eps) ;  M = 1 / (P (1 + lam P))
// ;
//   b = clip(((1 + lr wd) gap - sum((d - g) (g + lam P d) M + wd p (d - g))) / sum((d - g)^2 M), 0, b_max), first b_max
//   ; gap = (lr before) / lr sum(g (d / P + wd p)) ;  d <- ((1 - b) g + (lam P + b) d) / (1 + lam P), and the step is d
//   / P
#pragma once

#include "families/adaptive_memory.h"

namespace fusedopt {

struct AMAdamW {
  static constexpr auto name = "amadamw";
  static constexpr Names<2> states{"direction", "exp_avg_sq"};
  FUSEDOPT_SCALARS(step, beta, beta_product, last_lr);
  FUSEDOPT_HYPER(lr, weight_decay, beta2, eps, lam, beta_max);
  FUSEDOPT_COEFFICIENTS(beta2, one_minus_beta2, scale, root_scale, eps, lam, weight_decay, lr, gap_scale, beta_max,
                        beta);
  FUSEDOPT_MEASURES(gain, difference);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .scale = 1 - h.beta_max * s.beta_product,
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
        .lam = h.lam,
        .weight_decay = h.weight_decay,
        .lr = h.lr,
        .gap_scale = h.lr != 0 ? (1 + h.weight_decay * h.lr) * s.last_lr / h.lr : 0,
        .beta_max = h.beta_max,
        .beta = 0,
    };
  }

  // P, with the new second moment in the state.
  template <class T>
  FUSEDOPT_HD static T metric(T g, T* state, const Coefficients<T>& c) {
    state[1] = c.beta2 * state[1] + c.one_minus_beta2 * (g * g);
    return c.scale * (c.root_scale * std::sqrt(state[1]) + c.eps);
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, T* state, const Coefficients<T>& c) {
    const T stiffness = metric(g, state, c), d = state[0];
    const T weight = 1 / (stiffness * (1 + c.lam * stiffness)), change = d - g;
    const T gap = g * (d / stiffness + c.weight_decay * p);
    const T rest = change * (g + c.lam * stiffness * d) * weight + c.weight_decay * p * change;
    return {.gain = c.gap_scale * gap - rest, .difference = change * change * weight};
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    s.beta = s.beta_product == 1 ? c.beta_max : memory_of(m.whole.gain, m.whole.difference, c.beta_max);
    s.beta_product *= s.beta;
    s.last_lr = c.lr;
    c.beta = s.beta;
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    const T stiffness = metric(g, state, c), regularised = c.lam * stiffness;
    state[0] = ((1 - c.beta) * g + (regularised + c.beta) * state[0]) / (1 + regularised);
    return state[0] / stiffness;
  }
};

FUSEDOPT_REGISTER(AMAdamW)

}  // namespace fusedopt
