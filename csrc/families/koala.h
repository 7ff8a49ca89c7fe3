// What KoalaV and KoalaM share: the loss is a measurement of a Kalman filter, h = g + wd p its derivative by a tensor.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Koala {
  FUSEDOPT_MEASURES(grad, slope, param);

  // Without decay its weight is 0.
  template <class Coefficients>
  FUSEDOPT_HD static bool measures_param(const Coefficients& c) {
    return c.weight_decay != 0;
  }

  // A tensor whose gradient is shorter is left out.
  static constexpr double kShortest = 1e-9;

  template <class T>
  FUSEDOPT_HD static Measures<T> sums(T p, T g, T weight_decay) {
    const T h = g + weight_decay * p;
    return {.grad = g * g, .slope = h * h, .param = p * p};
  }

  FUSEDOPT_HD static bool is_measured(const Measures<double>& m) { return m.grad >= kShortest * kShortest; }

  // |h|^2 / S with S = variance |h|^2 + noise; 0 of what is left out.
  FUSEDOPT_HD static double information(const Measures<double>& m, double variance, double noise) {
    const double S = variance * m.slope + noise;
    return is_measured(m) && S > 0 ? m.slope / S : 0;
  }

  // What multiplies a variance to a gain: (loss + wd |p|^2 / 2) / S; 0 of what is left out.
  FUSEDOPT_HD static double residual(const Measures<double>& m, double variance, double noise, double loss,
                                     double weight_decay) {
    const double S = variance * m.slope + noise;
    return is_measured(m) && S > 0 ? (loss + 0.5 * weight_decay * m.param) / S : 0;
  }

  // The noise of the measurement after this step: fixed, or a running mean of the losses' squares.
  template <class Hyper>
  FUSEDOPT_HD static double noise_after(const Hyper& h, double noise) {
    if (h.online == 0) return h.r;
    return h.measured != 0 ? 0.9 * noise + 0.1 * h.loss_square : noise;
  }
};

}  // namespace fusedopt
