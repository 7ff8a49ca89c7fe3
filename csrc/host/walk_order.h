// The order in which a tensor is walked, and other tensors' layouts in that order.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/job.h"

namespace fusedopt::host {

// By what a parameter is walked. Falling strides make a dense one of any memory format (channels_last, transposed) one
// run of memory; with slices, dimension 0 is the outermost, whatever its stride; blocks lie in logical order.
enum class By { kStrides, kSlices, kLogicalOrder };

// The walking order of a parameter. Complex tensors count as real ones with a last dimension of 2.
class WalkOrder {
 public:
  WalkOrder(int ndim, const std::int64_t* shape, const std::int64_t* strides, bool is_complex, By by);

  std::int64_t numel() const { return numel_; }

  // The layout of a tensor of the parameter's shape, in walking order. ndim = 0: dense.
  Layout layout_of(const std::int64_t* strides) const;

 private:
  struct Dim {
    int index;
    std::int64_t size;
  };
  int parts_;  // 2 for complex
  std::int64_t numel_;
  std::vector<Dim> order_;  // outermost first; dimensions of size 1 left out
};

}  // namespace fusedopt::host
