// Prodigy:  g = g + wd p if decay is coupled ;  s <- b3 s + d/d0 d lr g ;  r <- b3 r + d/d0 d lr <g, p0 - p>
//   m <- b1 m + d (1 - b1) g ;  v <- b2 v + d^2 (1 - b2) g^2 ;  D = max(d, d_coef r / |s|_1), sums over the scope ;
//   p <- p - d lr (m / (sqrt(v) + D eps) + wd p if it is decoupled) ;  p0 is what p was before its first step
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Prodigy {
  static constexpr auto name = "prodigy";
  static constexpr Names<4> states{"s", "p0", "exp_avg", "exp_avg_sq"};
  FUSEDOPT_SCALARS(step, d, d_max, d_numerator, k);
  FUSEDOPT_HYPER(lr, beta1, beta2, beta3, eps, weight_decay, decouple, use_bias_correction, safeguard_warmup, d0,
                 d_coef, growth_rate);
  FUSEDOPT_COEFFICIENTS(lr, keep, take, keep_square, take_square, keep_sum, take_sum, coupled, decoupled, corrected,
                        weight, beta3, d0, d_coef, growth_rate, scale, eps);
  FUSEDOPT_MEASURES(along, length);

  static constexpr double kRounding = 1e-7;  // what float32 makes of d0 is nearer to it than that

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double weight = s.d / h.d0 * s.d;
    const bool moves = h.lr > 0;
    double corrected = 1;
    if (h.use_bias_correction != 0) {
      corrected = std::sqrt(bias_correction(h.beta2, s.k + 1)) / bias_correction(h.beta1, s.k + 1);
    }
    return {
        .lr = h.lr,
        .keep = moves ? h.beta1 : 1,
        .take = s.d * (1 - h.beta1),
        .keep_square = moves ? h.beta2 : 1,
        .take_square = s.d * s.d * (1 - h.beta2),
        .keep_sum = moves ? h.beta3 : 1,
        .take_sum = weight * (h.safeguard_warmup != 0 ? 1 : h.lr * corrected),
        .coupled = h.decouple != 0 ? 0 : h.weight_decay,
        .decoupled = h.decouple != 0 ? h.weight_decay : 0,
        .corrected = corrected,
        .weight = weight,
        .beta3 = h.beta3,
        .d0 = h.d0,
        .d_coef = h.d_coef,
        .growth_rate = h.growth_rate,
        .scale = moves ? s.d * corrected : 0,
        .eps = h.eps,
    };
  }

  // The gradient with coupled decay, or 0 of what does not move; the new sum of gradients is in the state then.
  template <class T>
  FUSEDOPT_HD static T advance(T p, T g, T* state, const Coefficients<T>& c) {
    const T h = c.lr > 0 ? g + c.coupled * p : T(0);
    state[0] = c.keep_sum * state[0] + c.take_sum * h;
    return h;
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, T* state, const Coefficients<T>& c) {
    const T h = advance(p, g, state, c);
    return {.along = c.corrected * h * (state[1] - p), .length = c.lr > 0 ? std::abs(state[0]) : T(0)};
  }

  // The learning rate of a tensor's group.
  FUSEDOPT_HD static double score(const Coefficients<double>& c, const Measures<double>&) { return c.lr; }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    if (m.whole.length == 0) {  // nothing has moved anything yet
      c.scale = 0;
      return;
    }
    const double largest = std::isinf(m.largest) ? c.lr : m.largest;
    s.d_numerator = c.beta3 * s.d_numerator + c.weight * largest * m.whole.along;
    const double estimate = c.d_coef * s.d_numerator / m.whole.length;
    const double d = s.d <= c.d0 * (1 + kRounding) && estimate > s.d ? estimate : s.d, limit = d * c.growth_rate;
    s.d_max = estimate > s.d_max ? estimate : s.d_max;
    s.d = limit < s.d_max ? limit : s.d_max;
    s.k += 1;
    c.eps = s.d * c.eps;
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const T h = advance(p, g, state, c);
    state[2] = c.keep * state[2] + c.take * h;
    state[3] = c.keep_square * state[3] + c.take_square * (h * h);
    return c.scale * (state[2] / (std::sqrt(state[3]) + c.eps) + c.decoupled * p);
  }
};

FUSEDOPT_REGISTER(Prodigy)

}  // namespace fusedopt
