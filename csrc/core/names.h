// Names of states, scalars and hyperparameters, as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedopt {

inline pybind11::list names(const char* const* list, int n) {
  pybind11::list out;
  for (int i = 0; i < n; ++i) out.append(list[i]);
  return out;
}

}  // namespace fusedopt
