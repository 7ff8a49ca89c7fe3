// Adagrad:  S <- S + g^2 ;  d = g / (sqrt(S) + eps) / (1 + (t - 1) lr_decay)
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Adagrad {
  static constexpr auto name = "adagrad";
  static constexpr Names<1> states{"sum"};
  static constexpr Names<1> scalars{"step"};
  static constexpr Names<2> hyper{"lr_decay", "eps"};
  struct Hyper {
    double lr_decay, eps;
  };
  struct Scalars {
    double step;
  };
  template <class T>
  struct Coefficients {
    T scale, eps;
  };

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {1 / (1 + (s.step - 1) * h.lr_decay), h.eps};
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] += g * g;
    return c.scale * g / (std::sqrt(state[0]) + c.eps);
  }
};

FUSEDOPT_REGISTER(Adagrad)

}  // namespace fusedopt
