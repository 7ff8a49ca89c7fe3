// SWATS:  Adam, q = -lr m sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps), whose sums <q, q> and <q, g> over the scope
// tell
//   the rate of the SGD step that is projected on it: r = <q, q> / -<q, g>, l <- b2 l + (1 - b2) r ;  once l / (1 -
//   b2^k) settles at r, SGD with that rate:  b <- b1 b + g ;  p <- p - (1 - b1) rate b
#pragma once

#include "families/adam.h"

namespace fusedopt {

template <bool SecondMoment>
struct SWATS {
  static constexpr auto name = "swats";
  static constexpr auto states = [] {
    if constexpr (SecondMoment) {
      return Names<2>{"exp_avg", "exp_avg_sq"};
    } else {
      return Names<1>{"exp_avg"};
    }
  }();
  FUSEDOPT_SCALARS(step, phase, rate, scope_step, adam_lr, sgd_lr, buffered, step_square, step_grad);
  FUSEDOPT_HYPER(lr, beta1, beta2, eps, tol);
  FUSEDOPT_COEFFICIENTS(lr, keep, take, beta2, one_minus_beta2, scale, root_scale, eps);
  FUSEDOPT_EPILOGUE(step_square, step_grad);

  static constexpr double kRelative = 1e-6;  // part of the tolerance

  // What the last step's sums tell.
  FUSEDOPT_HD static void decide(const Hyper& h, Scalars& s) {
    if (s.phase != 0 || s.scope_step < 1 || s.step_grad == 0) return;
    const double rate = s.step_square / s.step_grad;
    s.rate = h.beta2 * s.rate + (1 - h.beta2) * rate;
    const double settled = s.rate / bias_correction(h.beta2, s.scope_step);
    if (s.scope_step > 1 && settled > 0 && std::abs(settled - rate) < h.tol + kRelative * std::abs(rate)) {
      s.phase = 1;
      s.sgd_lr = settled;
    }
  }

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    decide(h, s);
    s.scope_step += 1;
    if (s.phase != 0) {
      const double base = s.adam_lr > 0 ? s.adam_lr : h.lr;
      const double keep = s.buffered != 0 ? h.beta1 : 0;
      s.buffered = 1;
      return {
          .lr = h.lr,
          .keep = keep,
          .take = 1,
          .beta2 = 1,
          .one_minus_beta2 = 0,
          .scale = base > 0 ? (1 - h.beta1) * s.sgd_lr / base : 0,
          .root_scale = 0,
          .eps = 1,
      };
    }
    s.adam_lr = h.lr;
    return {
        .lr = h.lr,
        .keep = h.beta1,
        .take = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .scale = std::sqrt(bias_correction(h.beta2, s.step)) / bias_correction(h.beta1, s.step),
        .root_scale = 1,
        .eps = h.eps,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] = c.keep * state[0] + c.take * g;
    if constexpr (SecondMoment) {
      state[1] = c.beta2 * state[1] + c.one_minus_beta2 * (g * g);
      return c.scale * state[0] / (c.root_scale * std::sqrt(state[1]) + c.eps);
    }
    return c.scale * state[0];
  }

  template <class T>
  FUSEDOPT_HD static Epilogue<T> conclude(T, T g, T d, T*, const Coefficients<T>& c) {
    const T q = c.lr * d;
    return {.step_square = q * q, .step_grad = q * g};
  }
};

#if !defined(__CUDACC__)  // nvcc 13.0 takes more than six minutes for it; on GPUs Triton steps it
FUSEDOPT_REGISTER(SWATS<true>, SWATS<false>)
#endif

}  // namespace fusedopt
