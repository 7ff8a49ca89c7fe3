// Kernels of the rules that are compiled into this engine, found by name. Each steps all variants of its rule.
#pragma once

#include <vector>

#include "cuda/tables.h"

namespace fusedopt::cuda {

struct Variant {
  int n_states;
  const char* const* states;
};

// A kernel for some variants of a rule, at both sizes of its arguments.
struct Entry {
  const char* rule;
  int n_scalars, n_hyper;
  const char* const* scalars;
  const char* const* hyper;
  std::vector<Variant> variants;
  void (*small)(Arguments<kSmall>);
  void (*large)(Arguments<kLarge>);
};

inline std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

}  // namespace fusedopt::cuda
