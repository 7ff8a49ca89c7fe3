// ADOPT, whose second moment is that of the steps before, and divides before the first is taken:
//   n = clamp((g + l2 p) / max(sqrt(v), eps), -clip, clip) ;  m <- b1 m + (1 - b1) n ;  v <- b2 v + (1 - b2) g^2
//   d = m + decay p ;  the first step only sets v <- g^2.
#pragma once

#include <limits>

#include "core/math.h"

namespace fusedopt {

struct Adopt {
  static constexpr auto name = "adopt";
  static constexpr Names<2> states{"exp_avg", "exp_avg_sq"};
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(weight_decay, beta1, beta2, eps, clip_exp, clips, decoupled);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, keep_sq, take_sq, eps, clip, coupled, decay);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const bool is_first = s.step == 1;
    const double clip = h.clips != 0 ? std::pow(s.step - 1, h.clip_exp) : std::numeric_limits<double>::infinity();
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .keep_sq = is_first ? 1 : h.beta2,
        .take_sq = is_first ? 1 : 1 - h.beta2,
        .eps = h.eps,
        .clip = is_first ? 0 : clip,
        .coupled = h.decoupled != 0 ? 0 : h.weight_decay,
        .decay = h.decoupled != 0 && !is_first ? h.weight_decay : 0,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    g += c.coupled * p;
    const T n = clamp(g / maximum(std::sqrt(state[1]), c.eps), -c.clip, c.clip);
    state[0] = lerp(state[0], n, c.one_minus_beta1);
    state[1] = c.keep_sq * state[1] + c.take_sq * (g * g);
    return state[0] + c.decay * p;
  }
};

FUSEDOPT_REGISTER(Adopt)

}  // namespace fusedopt
