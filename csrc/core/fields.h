// Fields and their names, of one list.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace fusedopt {

template <std::size_t N>
using Names = std::array<std::string_view, N>;

constexpr std::size_t count_fields(std::string_view list) {
  std::size_t n = !list.empty();
  for (const char c : list) n += c == ',';
  return n;
}

// The names in a list such as "beta1, beta2, eps".
template <std::size_t N>
constexpr Names<N> split_fields(std::string_view list) {
  Names<N> names{};
  std::size_t begin = 0;
  for (std::string_view& name : names) {
    while (list[begin] == ' ') ++begin;
    const std::size_t end = list.find(',', begin);
    name = list.substr(begin, end == list.npos ? end : end - begin);
    begin = end + 1;
  }
  return names;
}

}  // namespace fusedopt

#define FUSEDOPT_NAMES(...) \
  ::fusedopt::split_fields<::fusedopt::count_fields(#__VA_ARGS__)>(std::string_view(#__VA_ARGS__))

// Inside a rule: a struct of double, and the array of its fields' names.
#define FUSEDOPT_FIELDS(Struct, names, ...) \
  struct Struct {                           \
    __VA_OPT__(double __VA_ARGS__;)         \
  };                                        \
  static constexpr auto names = FUSEDOPT_NAMES(__VA_ARGS__)

#define FUSEDOPT_HYPER(...) FUSEDOPT_FIELDS(Hyper, hyper, __VA_ARGS__)
#define FUSEDOPT_SCALARS(...) FUSEDOPT_FIELDS(Scalars, scalars, __VA_ARGS__)

// The same of T, for Struct<T>.
#define FUSEDOPT_FIELDS_OF(Struct, names, ...) \
  template <class T>                           \
  struct Struct {                              \
    T __VA_ARGS__;                             \
  };                                           \
  static constexpr auto names = FUSEDOPT_NAMES(__VA_ARGS__)

#define FUSEDOPT_COEFFICIENTS(...) FUSEDOPT_FIELDS_OF(Coefficients, coefficients, __VA_ARGS__)
#define FUSEDOPT_MEASURES(...) FUSEDOPT_FIELDS_OF(Measures, measures, __VA_ARGS__)
#define FUSEDOPT_EPILOGUE(...) FUSEDOPT_FIELDS_OF(Epilogue, epilogue, __VA_ARGS__)
