// KOALA-V:  s <- s + q ;  h = g + wd p ;  S = s |h|^2 + R ;  p <- p - lr s / S (loss + wd |p|^2 / 2) h ;
//   s <- s - s^2 max |h|^2 / S over all tensors.  As the authors' code has it, the step is along g.
#pragma once

#include "families/koala.h"

namespace fusedopt {

struct KoalaV : Koala {
  static constexpr auto name = "koalav";
  static constexpr Names<0> states{};
  FUSEDOPT_SCALARS(step, sigma, noise);
  FUSEDOPT_HYPER(weight_decay, q, r, online, match_reference, loss, loss_square, measured);
  FUSEDOPT_COEFFICIENTS(weight_decay, sigma, noise, loss, measured, gain, decay);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    if (h.measured != 0) s.sigma += h.q;
    s.noise = noise_after(h, s.noise);
    return {
        .weight_decay = h.weight_decay,
        .sigma = s.sigma,
        .noise = s.noise,
        .loss = h.loss,
        .measured = h.measured,
        .gain = 0,
        .decay = h.match_reference != 0 ? 0 : h.weight_decay,
    };
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, const Coefficients<T>& c) {
    return sums(p, g, c.weight_decay);
  }

  FUSEDOPT_HD static double score(const Coefficients<double>& c, const Measures<double>& m) {
    return information(m, c.sigma, c.noise);
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    if (c.measured == 0) return;
    c.gain = c.sigma * residual(m, c.sigma, c.noise, c.loss, c.weight_decay);
    c.decay *= c.gain;
    if (m.largest > 0) s.sigma = c.sigma * (1 - c.sigma * m.largest);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T*, const Coefficients<T>& c) {
    return c.gain * g + c.decay * p;
  }
};

FUSEDOPT_REGISTER(KoalaV)

}  // namespace fusedopt
