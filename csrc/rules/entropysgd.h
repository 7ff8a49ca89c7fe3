// EntropySGD, a step of a loop, and what follows its last:
//   b <- inner_momentum b + g ;  u = b, or g + inner_momentum b with Nesterov, or g without such momentum
//   p <- p - inner_lr (u + gamma (p - x)) ;  mu <- mu + (1 - alpha) (p - mu)
//   ends:  w = x - mu, along a buffer of its own as u is along b ;  p <- x - lr w ;  x, mu <- p ;  b <- 0
// Where a loop begins x and mu are p, and b is g. Where lr is 0, so is inner_lr.
#pragma once

#include "core/math.h"

namespace fusedopt {

template <bool Momentum, bool Inner>
struct EntropySGD {
  static constexpr auto name = "entropysgd";
  static constexpr auto states = [] {
    if constexpr (Momentum && Inner) {
      return Names<4>{"anchor", "inner_average", "momentum_buffer", "inner_momentum_buffer"};
    } else if constexpr (Momentum) {
      return Names<3>{"anchor", "inner_average", "momentum_buffer"};
    } else if constexpr (Inner) {
      return Names<3>{"anchor", "inner_average", "inner_momentum_buffer"};
    } else {
      return Names<2>{"anchor", "inner_average"};
    }
  }();
  static constexpr auto step_scale = StepScale::kOne;
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(lr, momentum, inner_momentum, nesterov, inner_lr, alpha, gamma, begins, ends);
  FUSEDOPT_COEFFICIENTS(lr, inner_lr, momentum, inner_momentum, nesterov, gamma, one_minus_alpha, begins, ends);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool) {
    return {
        .lr = h.lr,
        .inner_lr = h.lr != 0 ? h.inner_lr : 0,
        .momentum = h.momentum,
        .inner_momentum = h.inner_momentum,
        .nesterov = h.nesterov,
        .gamma = h.gamma,
        .one_minus_alpha = 1 - h.alpha,
        .begins = h.begins,
        .ends = h.ends,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const bool begins = c.begins != T(0), ends = c.ends != T(0);
    T x = begins ? p : state[0];
    T mu = begins ? p : state[1];
    if constexpr (Inner) {
      T& kept = state[Momentum ? 3 : 2];
      const T b = begins ? g : c.inner_momentum * kept + g;
      g = c.nesterov != T(0) ? g + c.inner_momentum * b : b;
      kept = ends ? T(0) : b;
    }
    T d = c.inner_lr * (g + c.gamma * (p - x));
    mu += c.one_minus_alpha * (p - d - mu);
    if (ends) {
      T w = x - mu;
      if constexpr (Momentum) {
        state[2] = c.momentum * state[2] + w;
        w = c.nesterov != T(0) ? w + c.momentum * state[2] : state[2];
      }
      d = (p - x) + c.lr * w;
      x = mu = p - d;
    }
    state[0] = x;
    state[1] = mu;
    return d;
  }
};

FUSEDOPT_REGISTER(EntropySGD<false, false>, EntropySGD<false, true>, EntropySGD<true, false>, EntropySGD<true, true>)

}  // namespace fusedopt
