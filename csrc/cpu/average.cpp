#include "cpu/average.h"

#include "core/math.h"
#include "cpu/blocks.h"

namespace fusedopt::cpu {
namespace {

template <bool PutsBack, class T>
inline void average_block(T* param, T* average, T weight, std::int64_t begin, int count) {
  FUSEDOPT_INDEPENDENT
  for (std::int64_t i = begin; i < begin + count; ++i) {
    const T now = lerp(average[i], param[i], weight);
    average[i] = now;
    if constexpr (PutsBack) param[i] = now;
  }
}

template <bool PutsBack, class T>
void average_all(T* param, T* average, T weight, std::int64_t n, std::int64_t last) {
  each_block<1>(0, n, last, &average,
                [&](std::int64_t begin, int count) { average_block<PutsBack>(param, average, weight, begin, count); });
}

}  // namespace

template <class T>
void average(T* param, T* average, T weight, bool puts_back, std::int64_t n, std::int64_t last) {
  (puts_back ? average_all<true, T> : average_all<false, T>)(param, average, weight, n, last);
}

template void average<float>(float*, float*, float, bool, std::int64_t, std::int64_t);
template void average<double>(double*, double*, double, bool, std::int64_t, std::int64_t);

}  // namespace fusedopt::cpu
