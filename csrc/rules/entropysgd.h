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
    const bool begins = c.begins != T(0), ends = c.ends != T(0), nesterov = c.nesterov != T(0);
    const T x = begins ? p : state[0];
    T mu = begins ? p : state[1];
    if constexpr (Inner) {
      T& kept = state[Momentum ? 3 : 2];
      const T b = begins ? g : c.inner_momentum * kept + g;
      g = nesterov ? g + c.inner_momentum * b : b;
      kept = ends ? T(0) : b;
    }
    T d = c.inner_lr * (g + c.gamma * (p - x));
    mu += c.one_minus_alpha * (p - d - mu);
    T w = x - mu;
    if constexpr (Momentum) {
      const T b = c.momentum * state[2] + w;
      w = nesterov ? w + c.momentum * b : b;
      state[2] = ends ? b : state[2];
    }
    d = ends ? (p - x) + c.lr * w : d;  // whatever is chosen is computed, so that loops are vectorised
    state[0] = ends ? p - d : x;
    state[1] = ends ? p - d : mu;
    return d;
  }
};

FUSEDOPT_REGISTER(EntropySGD<false, false>, EntropySGD<false, true>, EntropySGD<true, false>, EntropySGD<true, true>)

}  // namespace fusedopt
