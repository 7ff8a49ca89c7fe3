// What the schedule-free rules share: an average of iterates in the place of a schedule.
//   c = w / (sum of w) with w = t^r lr_max^power ;  y <- y + c (z - y) - lr (1 - beta (1 - c)) u ;  z <- z - lr u
#pragma once

#include "core/math.h"

namespace fusedopt {

// How far y goes towards z in a step, how far along its direction, and how far z does.
struct Scheduled {
  double share, along, lr;
};

// Advances the scalars.
template <class Hyper, class Scalars>
FUSEDOPT_HD Scheduled scheduled(const Hyper& h, Scalars& s) {
  const double warmed = h.warmup_steps > s.step ? s.step / h.warmup_steps : 1, lr = h.lr * warmed;
  s.lr_max = lr > s.lr_max ? lr : s.lr_max;
  const double weight = std::pow(s.step, h.r) * std::pow(s.lr_max, h.weight_lr_power);
  s.weight_sum += weight;
  const double share = s.weight_sum != 0 ? weight / s.weight_sum : 0;
  return {share, lr * (1 - h.beta1 * (1 - share)), lr};
}

}  // namespace fusedopt
