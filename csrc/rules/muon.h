// Muon's steps before and after its matrix function, and the AdamW beside it; the states say which a parameter takes:
//   exp_avg, exp_avg_sq    d = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)
//   momentum_buffer        p = m + (1 - ahead) (g - m) with m <- mu m + (1 - mu) g, where p is what the function is of
//   none                   d = g, where g is what the function made
#pragma once

#include "families/adam.h"

namespace fusedopt {

enum class MuonPart { kAdamW, kBefore, kAfter };

template <MuonPart Part>
struct Muon {
  static constexpr auto name = "muon";
  static constexpr auto states = [] {
    if constexpr (Part == MuonPart::kAdamW) {
      return AdamMoments<false>::states;
    } else if constexpr (Part == MuonPart::kBefore) {
      return Names<1>{"momentum_buffer"};
    } else {
      return Names<0>{};
    }
  }();
  static constexpr bool replaces = Part == MuonPart::kBefore;
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(momentum, nesterov, beta1, beta2, eps);
  FUSEDOPT_COEFFICIENTS(one_minus_momentum, ahead, one_minus_beta1, beta2, one_minus_beta2, m_scale, root_scale, eps);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {
        .one_minus_momentum = 1 - h.momentum,
        .ahead = h.nesterov != 0 ? h.momentum : 1,
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = 1 / bias_correction(h.beta1, s.step),
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, [[maybe_unused]] T* state, [[maybe_unused]] const Coefficients<T>& c) {
    if constexpr (Part == MuonPart::kAdamW) {
      const T v = update_moments<false>(g, state, c.one_minus_beta1, c.beta2, c.one_minus_beta2);
      return c.m_scale * state[0] / (c.root_scale * std::sqrt(v) + c.eps);
    } else if constexpr (Part == MuonPart::kBefore) {
      state[0] = lerp(state[0], g, c.one_minus_momentum);
      return lerp(g, state[0], c.ahead);
    } else {
      return g;
    }
  }
};

FUSEDOPT_REGISTER(Muon<MuonPart::kAdamW>, Muon<MuonPart::kBefore>, Muon<MuonPart::kAfter>)

}  // namespace fusedopt
