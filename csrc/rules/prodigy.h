// Prodigy:  m <- b1 m + (1 - b1) d g ;  v <- b2 v + (1 - b2) d^2 g^2 ;  s <- b3 s + lr d^2 / d0 g ;  over everything
//   r <- b3 r + lr d^2 / d0 sum g (p0 - p) ;  d <- max(d, coef r / sum |s|) ;
//   p <- p - d lr (m / (sqrt(v) + d eps) + wd p) with the d before, but for that beside eps
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Prodigy {
  static constexpr auto name = "prodigy";
  static constexpr Names<4> states{"s", "p0", "exp_avg", "exp_avg_sq"};
  static constexpr auto step_scale = StepScale::kOne;
  FUSEDOPT_SCALARS(step, d, d_max, d_numerator);
  FUSEDOPT_HYPER(lr, weight_decay, beta1, beta2, beta3, eps, d0, d_coef, growth_rate, decouple, use_bias_correction,
                 safeguard_warmup);
  FUSEDOPT_COEFFICIENTS(is_new, moves, coupled, decay, keep_m, take_m, keep_v, take_v, keep_s, take_s, slope_scale,
                        beta3, d0, d_coef, growth_rate, eps, d_lr);
  FUSEDOPT_MEASURES(slope, size);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool new_state) {
    const double scale = std::sqrt(bias_correction(h.beta2, s.step)) / bias_correction(h.beta1, s.step);
    const double d_lr = s.d * h.lr * (h.use_bias_correction != 0 ? scale : 1);
    const double beta3 = h.beta3 > 0 ? h.beta3 : std::sqrt(h.beta2);
    const bool moves = h.lr > 0;
    return {
        .is_new = new_state ? 1.0 : 0.0,
        .moves = moves ? 1.0 : 0.0,
        .coupled = h.decouple != 0 ? 0 : h.weight_decay,
        .decay = h.decouple != 0 ? h.weight_decay : 0,
        .keep_m = moves ? h.beta1 : 1,
        .take_m = moves ? s.d * (1 - h.beta1) : 0,
        .keep_v = moves ? h.beta2 : 1,
        .take_v = moves ? s.d * s.d * (1 - h.beta2) : 0,
        .keep_s = moves ? beta3 : 1,
        .take_s = moves ? s.d / h.d0 * (h.safeguard_warmup != 0 ? s.d : d_lr) : 0,
        .slope_scale = s.d / h.d0 * d_lr,
        .beta3 = beta3,
        .d0 = h.d0,
        .d_coef = h.d_coef,
        .growth_rate = h.growth_rate,
        .eps = h.eps,
        .d_lr = d_lr,
    };
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, T* state, const Coefficients<T>& c) {
    g += c.coupled * p;
    const T start = c.is_new != T(0) ? p : state[1];
    return {
        .slope = c.slope_scale * (g * (start - p)),
        .size = c.moves * std::fabs(c.keep_s * state[0] + c.take_s * g),
    };
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    constexpr double single = 1 + 1e-6;  // a number and itself in float are nearer to each other than by this factor
    if (m.whole.size > 0) {
      s.d_numerator = c.beta3 * s.d_numerator + m.whole.slope;
      const double estimate = c.d_coef * s.d_numerator / m.whole.size;
      const double d = s.d <= c.d0 * single && estimate > s.d ? estimate : s.d;
      s.d_max = estimate > s.d_max ? estimate : s.d_max;
      const double grown = d * c.growth_rate;
      s.d = grown < s.d_max ? grown : s.d_max;
    } else {  // nothing is known yet, and nothing moves
      c.d_lr = 0;
    }
    c.eps *= s.d;
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    g += c.coupled * p;
    state[0] = c.keep_s * state[0] + c.take_s * g;
    state[1] = c.is_new != T(0) ? p : state[1];
    state[2] = c.keep_m * state[2] + c.take_m * g;
    state[3] = c.keep_v * state[3] + c.take_v * (g * g);
    return c.d_lr * (state[2] / (std::sqrt(state[3]) + c.eps) + c.decay * p);
  }
};

FUSEDOPT_REGISTER(Prodigy)

}  // namespace fusedopt
