// What a rule is: the mathematics of one optimizer on values, shared by the CPU and CUDA engines.
//
// A rule is a struct with
//   name, states, scalars, hyper         names, the same as in Python and in `state_dict`
//   Hyper, Scalars                       structs of double, fields in the order of the names
//   Coefficients<T>                      struct of T only: what an element needs besides its values
//   prepare(hyper, scalars, first)       once per step and cohort, in double; may advance scalars
//                                        (`step` already counts this step; `first` is true when the
//                                        state was created in this step)
//   direction(p, g, state, c) -> d       once per element; updates state[], returns d of p -= lr * d
// Rules that differ in the number of states are template variants with one name.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline
#endif

// An engine's translation unit defines this before it includes a rule header, to instantiate it.
#if !defined(FUSEDOPT_REGISTER)
#define FUSEDOPT_REGISTER(...)
#endif

namespace fusedopt {

constexpr int kMaxStates = 4;
constexpr int kMaxScalars = 2;
constexpr int kMaxHyper = 8;
constexpr int kMaxCoefficients = 8;

template <std::size_t N>
using Names = std::array<const char*, N>;

// Coefficients<double> -> Coefficients<T>; both are plain runs of their element type.
template <class Rule, class T>
FUSEDOPT_HD typename Rule::template Coefficients<T> cast_coefficients(const double* source) {
  using Target = typename Rule::template Coefficients<T>;
  constexpr int count = sizeof(Target) / sizeof(T);
  static_assert(count <= kMaxCoefficients && sizeof(Target) == count * sizeof(T));
  union {
    T values[count];
    Target target;
  } u;
  for (int i = 0; i < count; ++i) u.values[i] = static_cast<T>(source[i]);
  return u.target;
}

// Rule::prepare on plain runs of double, in the order of the names; advances scalars.
template <class Rule>
FUSEDOPT_HD void prepare(const double* hyper, double* scalars, bool first, double* coefficients) {
  typename Rule::Hyper h;
  typename Rule::Scalars s;
  static_assert(Rule::hyper.size() <= kMaxHyper && Rule::scalars.size() <= kMaxScalars);
  static_assert(sizeof(h) == sizeof(double) * Rule::hyper.size());
  __builtin_memcpy(&h, hyper, sizeof(double) * Rule::hyper.size());
  __builtin_memcpy(&s, scalars, sizeof(double) * Rule::scalars.size());
  const typename Rule::template Coefficients<double> c = Rule::prepare(h, s, first);
  static_assert(sizeof(c) <= sizeof(double) * kMaxCoefficients);
  __builtin_memcpy(scalars, &s, sizeof(double) * Rule::scalars.size());
  __builtin_memcpy(coefficients, &c, sizeof(c));
}

}  // namespace fusedopt
