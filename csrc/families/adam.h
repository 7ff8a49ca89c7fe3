// What the Adam family shares: moments, and the step that is a ratio of both.
#pragma once

#include "core/math.h"

namespace fusedopt {

//   m <- b1 m + (1 - b1) g ;  v <- b2 v + (1 - b2) g^2 ;  with Max: x <- max(x, v), x in place of v
// Returns the second moment that the step divides by.
template <bool Max, class T>
FUSEDOPT_HD T update_moments(T g, T* state, T one_minus_beta1, T beta2, T one_minus_beta2) {
  T& m = state[0];
  T& v = state[1];
  m = lerp(m, g, one_minus_beta1);
  v = beta2 * v + one_minus_beta2 * (g * g);
  if constexpr (Max) {
    state[2] = maximum(state[2], v);
    return state[2];
  }
  return v;
}

template <bool Max>
struct AdamMoments {
  static constexpr auto states = [] {
    if constexpr (Max) {
      return Names<3>{"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
    } else {
      return Names<2>{"exp_avg", "exp_avg_sq"};
    }
  }();
};

//   d = (m_scale m + g_scale g) / (root_scale sqrt(w) + eps)
template <bool Max, class T, class Coefficients>
FUSEDOPT_HD T adam_ratio(T g, T* state, const Coefficients& c) {
  const T w = update_moments<Max>(g, state, c.one_minus_beta1, c.beta2, c.one_minus_beta2);
  return (c.m_scale * state[0] + c.g_scale * g) / (c.root_scale * std::sqrt(w) + c.eps);
}

// The rules whose direction it is.
template <bool Max>
struct AdamRatio : AdamMoments<Max> {
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, beta2, one_minus_beta2, m_scale, g_scale, root_scale, eps);

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    return adam_ratio<Max>(g, state, c);
  }
};

}  // namespace fusedopt
