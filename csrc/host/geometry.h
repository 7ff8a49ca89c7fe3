// The order in which a tensor is walked, and other tensors' layouts in that order.
#pragma once

#include <cstdint>
#include <vector>

#include "core/job.h"
#include "host/tensor.h"

namespace fusedopt::host {

// The walking order of a parameter: by falling stride, so that a dense parameter of any memory
// format (channels_last, transposed) is one run of memory. Complex tensors count as real ones with a
// last dimension of 2.
class Geometry {
 public:
  explicit Geometry(const DLTensor& parameter) : Geometry(parameter, parameter.strides) {}
  Geometry(const DLTensor& same_shape, const std::int64_t* parameter_strides);

  std::int64_t numel() const { return numel_; }

  // The layout of `t`, which has the parameter's shape, in walking order. ndim = 0: dense.
  Layout layout_of(const DLTensor& t) const;

 private:
  int parts_;  // 2 for complex
  std::int64_t numel_;
  std::vector<int> order_;  // outermost first; dimensions of size 1 left out
};

}  // namespace fusedopt::host
