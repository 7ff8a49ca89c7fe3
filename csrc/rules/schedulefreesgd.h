// Schedule-free SGD:  u = g + wd y ;  y goes towards z and along -u
#pragma once

#include "families/schedule_free.h"

namespace fusedopt {

struct ScheduleFreeSGD {
  static constexpr auto name = "schedulefreesgd";
  static constexpr Names<1> states{"z"};
  static constexpr auto step_scale = StepScale::kOne;
  FUSEDOPT_SCALARS(step, weight_sum, lr_max);
  FUSEDOPT_HYPER(lr, weight_decay, beta1, warmup_steps, r, weight_lr_power);
  FUSEDOPT_COEFFICIENTS(share, along, lr, decay);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const Scheduled now = scheduled(h, s);
    return {
        .share = now.share,
        .along = now.along,
        .lr = now.lr,
        .decay = h.weight_decay,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const T z = state[0], u = g + c.decay * p;
    state[0] = z - c.lr * u;
    return c.share * (p - z) + c.along * u;
  }
};

FUSEDOPT_REGISTER(ScheduleFreeSGD)

}  // namespace fusedopt
