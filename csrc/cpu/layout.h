// The way through the memory of an operand that is not dense.
#pragma once

#include "cpu/job.h"

namespace fusedopt::cpu {

// Calls visit(buffer index, memory offset, stride, length) for each innermost run of the range.
template <class Visit>
inline void walk(const Layout& layout, std::int64_t begin, std::int64_t count, Visit visit) {
  const int last = layout.ndim - 1;
  std::int64_t index[kMaxDims];
  std::int64_t offset = 0, rest = begin;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % layout.shape[d];
    rest /= layout.shape[d];
    offset += index[d] * layout.stride[d];
  }
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t left = layout.shape[last] - index[last];
    const std::int64_t run = left < count - done ? left : count - done;
    visit(done, offset, layout.stride[last], run);
    done += run;
    index[last] += run;
    offset += run * layout.stride[last];
    for (int d = last; d > 0 && index[d] == layout.shape[d]; --d) {
      offset += layout.stride[d - 1] - layout.shape[d] * layout.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

}  // namespace fusedopt::cpu
