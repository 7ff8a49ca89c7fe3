// Kernels of the rules that are compiled into this engine, found by name. Each steps all variants of its rule.
#pragma once

#include <vector>

#include "cuda/tables.h"

namespace fusedopt::cuda {

// A kernel for some variants of a rule, at both sizes of its arguments, and with options beside it.
struct Entry {
  std::vector<RuleNames> variants;  // which differ in their states
  void (*small)(Arguments<kSmall>);
  void (*large)(Arguments<kLarge>);
  void (*optioned)(Arguments<kSmall>);

  const RuleNames& names() const { return variants.front(); }
};

inline std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

}  // namespace fusedopt::cuda
