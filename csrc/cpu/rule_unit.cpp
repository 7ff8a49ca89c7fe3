// Instantiates the kernels of one rule header; the build compiles this file once per header and ISA level.
#include "cpu/registry.h"

#undef FUSEDOPT_REGISTER
#define FUSEDOPT_REGISTER(...) \
  [[maybe_unused]] static const bool registered = fusedopt::cpu::add_kernels<__VA_ARGS__>();

#include FUSEDOPT_RULE_HEADER
