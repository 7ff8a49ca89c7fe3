// Schedule-free AdamW:  u = g / (sqrt(v) / sqrt(1 - b2^t) + eps) + wd y ;  y goes towards z and along -u
#pragma once

#include "families/schedule_free.h"

namespace fusedopt {

struct ScheduleFreeAdamW {
  static constexpr auto name = "schedulefreeadamw";
  static constexpr Names<2> states{"z", "exp_avg_sq"};
  static constexpr auto step_scale = StepScale::kOne;
  FUSEDOPT_SCALARS(step, weight_sum, lr_max);
  FUSEDOPT_HYPER(lr, weight_decay, beta1, beta2, eps, warmup_steps, r, weight_lr_power);
  FUSEDOPT_COEFFICIENTS(share, along, lr, decay, beta2, one_minus_beta2, root_scale, eps);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const Scheduled now = scheduled(h, s);
    return {
        .share = now.share,
        .along = now.along,
        .lr = now.lr,
        .decay = h.weight_decay,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const T z = state[0];
    state[1] = c.beta2 * state[1] + c.one_minus_beta2 * (g * g);
    const T u = g / (c.root_scale * std::sqrt(state[1]) + c.eps) + c.decay * p;
    state[0] = z - c.lr * u;
    return c.share * (p - z) + c.along * u;
  }
};

FUSEDOPT_REGISTER(ScheduleFreeAdamW)

}  // namespace fusedopt
