// KOALA-M, with a velocity u and an average e for each parameter, and a covariance P of 2 by 2 for all:
//   predicted (p <- p + u, u <- a u beforehand):  qw <- 0.9 qw + 0.1 drift ;  P <- F P F' + diag(qw, qv), F = (1 1; 0
//   a) h = g + wd p ;  S = P00 |h|^2 + R ;  k = (loss + wd |p|^2 / 2) / S ;  p <- p - lr P00 k h ;  u <- u - lr P10 k h
//   ; e <- 0.9 e + 0.1 p ;  P <- P - max |h|^2 / S P[:,0] P[:,0]' over all tensors
#pragma once

#include "families/koala.h"

namespace fusedopt {

struct KoalaM : Koala {
  static constexpr auto name = "koalam";
  static constexpr Names<2> states{"velocity", "average"};
  FUSEDOPT_SCALARS(step, p00, p10, p11, qw, noise, predictions);
  FUSEDOPT_HYPER(lr, weight_decay, a, qv, r, online, loss, loss_square, measured, drift, predictions);
  FUSEDOPT_COEFFICIENTS(lr, weight_decay, p00, p10, p11, noise, loss, measured, gain, velocity_gain, follow);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    // One, or two after steps that were skipped, until all are done.
    for (int k = 0; k < 2 && s.predictions < h.predictions; ++k, s.predictions += 1) {
      s.qw = 0.9 * s.qw + 0.1 * h.drift;
      s.p00 += 2 * s.p10 + s.p11 + s.qw;
      s.p10 = h.a * (s.p10 + s.p11);
      s.p11 = h.a * h.a * s.p11 + h.qv;
    }
    s.noise = noise_after(h, s.noise);
    return {
        .lr = h.lr,
        .weight_decay = h.weight_decay,
        .p00 = s.p00,
        .p10 = s.p10,
        .p11 = s.p11,
        .noise = s.noise,
        .loss = h.loss,
        .measured = h.measured,
        .gain = 0,
        .velocity_gain = 0,
        .follow = 0,
    };
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, const Coefficients<T>& c) {
    return sums(p, g, c.weight_decay);
  }

  FUSEDOPT_HD static double score(const Coefficients<double>& c, const Measures<double>& m) {
    return information(m, c.p00, c.noise);
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    if (c.measured == 0) return;
    const double k = residual(m, c.p00, c.noise, c.loss, c.weight_decay);
    c.gain = c.p00 * k;
    c.velocity_gain = c.lr * c.p10 * k;
    c.follow = is_measured(m) ? 0.1 : 0;
    if (m.largest > 0) {
      s.p00 = c.p00 * (1 - m.largest * c.p00);
      s.p10 = c.p10 * (1 - m.largest * c.p00);
      s.p11 = c.p11 - m.largest * c.p10 * c.p10;
    }
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const T h = g + c.weight_decay * p, d = c.gain * h;
    state[0] -= c.velocity_gain * h;
    state[1] += c.follow * (p - c.lr * d - state[1]);
    return d;
  }
};

FUSEDOPT_REGISTER(KoalaM)

}  // namespace fusedopt
