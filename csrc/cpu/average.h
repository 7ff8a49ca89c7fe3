// Averages of the parameters.
#pragma once

#include "cpu/job.h"

namespace fusedopt::cpu {

// average <- lerp(average, param, weight), of n elements after which come others up to `last`; then, if it puts back,
// param <- average.
template <class T>
void average(T* param, T* average, T weight, bool puts_back, std::int64_t n, std::int64_t last);

}  // namespace fusedopt::cpu
