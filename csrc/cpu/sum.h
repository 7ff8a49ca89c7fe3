// Sums in double, in a fixed order of lanes, so that the same values have the same bits.
#pragma once

#include <cstdint>

namespace fusedopt::cpu {

// The sum of value_of(x[i]) over n elements.
template <class T, class ValueOf>
double sum_of(const T* x, std::int64_t n, ValueOf value_of) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += value_of(static_cast<double>(x[i + k]));
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += value_of(static_cast<double>(x[i]));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

template <class T>
double sum(const T* x, std::int64_t n) {
  return sum_of(x, n, [](double value) { return value; });
}

// Of squares, which are exact products where T is float.
template <class T>
double sum_squares(const T* x, std::int64_t n) {
  return sum_of(x, n, [](double value) { return value * value; });
}

}  // namespace fusedopt::cpu
