// MBF's steps before and after its blocks are inverted, and that of diagonal blocks; the states say which one it is:
//   momentum_buffer, exp_avg_sq   b <- mu b + g ;  v <- beta v + (1 - beta) g^2 ;  d = b / (v / (1 - beta^t) + damping)
//   block_momentum                b <- mu b + g ;  p = g, where p is what blocks are made of
//   none                          d = g, where g is b times the inverses
#pragma once

#include "core/math.h"

namespace fusedopt {

enum class MBFPart { kDiagonal, kBefore, kAfter };

template <MBFPart Part>
struct MBF {
  static constexpr auto name = "mbf";
  static constexpr auto states = [] {
    if constexpr (Part == MBFPart::kDiagonal) {
      return Names<2>{"momentum_buffer", "exp_avg_sq"};
    } else if constexpr (Part == MBFPart::kBefore) {
      return Names<1>{"block_momentum"};
    } else {
      return Names<0>{};
    }
  }();
  static constexpr bool replaces = Part == MBFPart::kBefore;
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(momentum, beta, damping);
  FUSEDOPT_COEFFICIENTS(momentum, beta, one_minus_beta, scale, damping);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {
        .momentum = h.momentum,
        .beta = h.beta,
        .one_minus_beta = 1 - h.beta,
        .scale = 1 / bias_correction(h.beta, s.step),
        .damping = h.damping,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, [[maybe_unused]] T* state, [[maybe_unused]] const Coefficients<T>& c) {
    if constexpr (Part != MBFPart::kAfter) state[0] = c.momentum * state[0] + g;
    if constexpr (Part == MBFPart::kDiagonal) {
      const T v = state[1] = c.beta * state[1] + c.one_minus_beta * (g * g);
      return state[0] / (c.scale * v + c.damping);
    }
    return g;
  }
};

FUSEDOPT_REGISTER(MBF<MBFPart::kDiagonal>, MBF<MBFPart::kBefore>, MBF<MBFPart::kAfter>)

}  // namespace fusedopt
