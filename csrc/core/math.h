// Small numeric helpers for rules. All propagate NaN.
#pragma once

#include "core/rule.h"

namespace fusedopt {

// 1 - beta^t without the cancellation of the plain form.
FUSEDOPT_HD double bias_correction(double beta, double t) { return -std::expm1(t * std::log(beta)); }

// a + w (b - a), from the nearer end, so that w = 0 and w = 1 are exact.
template <class T>
FUSEDOPT_HD T lerp(T a, T b, T w) {
  return w < T(0.5) ? a + w * (b - a) : b - (T(1) - w) * (b - a);
}

// sign(0) = 0, sign(NaN) = NaN.
template <class T>
FUSEDOPT_HD T sign(T x) {
  T s = x > T(0) ? T(1) : (x < T(0) ? T(-1) : T(0));
  return x == x ? s : x;
}

template <class T>
FUSEDOPT_HD T maximum(T a, T b) {
  const T larger = a >= b ? a : b;  // b where either is NaN
  return a == a ? larger : a;
}

template <class T>
FUSEDOPT_HD T clamp(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

}  // namespace fusedopt
