// What the rules have in common whose memory is chosen anew in every step.
#pragma once

#include "core/math.h"

namespace fusedopt {

// a / b between 0 and `high`; 0 where it is no number, or b is 0.
FUSEDOPT_HD double memory_of(double a, double b, double high) {
  const double ratio = b > 0 ? a / b : 0;
  return ratio > 0 ? (ratio < high ? ratio : high) : 0;
}

}  // namespace fusedopt
