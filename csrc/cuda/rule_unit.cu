// Instantiates the kernels of one rule header; the build compiles this file once per header.
#include "cuda/kernel.cuh"
#include "cuda/registry.h"

namespace fusedopt::cuda {

template <class Rule, class... More>
void add_entry() {
  entries().push_back({{names_of<Rule>, names_of<More>...},
                       &step<kSmall, Rule, More...>,
                       &step<kLarge, Rule, More...>,
                       &step<kSmall, Optioned<Rule>, Optioned<More>...>});
}

// A kernel for each variant, and where there are several, one that steps them all in one launch. Builds that are only
// compared with one another have the first alone.
template <class First, class... More>
bool add_entries() {
  add_entry<First>();
#if !defined(FUSEDOPT_FIRST_VARIANT)
  (add_entry<More>(), ...);
  if constexpr (sizeof...(More) > 0) add_entry<First, More...>();
#endif
  return true;
}

}  // namespace fusedopt::cuda

#undef FUSEDOPT_REGISTER
#define FUSEDOPT_REGISTER(...) \
  [[maybe_unused]] static const bool registered = fusedopt::cuda::add_entries<__VA_ARGS__>();

#include FUSEDOPT_RULE_HEADER
