#include "host/walk_order.h"

#include <algorithm>
#include <stdexcept>

namespace fusedopt::host {

WalkOrder::WalkOrder(int ndim, const std::int64_t* shape, const std::int64_t* strides, bool is_complex, By by)
    : parts_(is_complex ? 2 : 1), numel_(parts_) {
  for (int d = 0; d < ndim; ++d) {
    numel_ *= shape[d];
    if (shape[d] != 1) order_.push_back({d, shape[d]});
  }
  if (by == By::kLogicalOrder) return;
  const bool keeps_first = by == By::kSlices && !order_.empty() && order_.front().index == 0;
  std::stable_sort(order_.begin() + keeps_first, order_.end(),
                   [&](const Dim& a, const Dim& b) { return strides[a.index] > strides[b.index]; });
}

Layout WalkOrder::layout_of(const std::int64_t* strides) const {
  Layout out;
  if (numel_ <= parts_) return out;
  const auto append = [&](std::int64_t size, std::int64_t stride) {
    if (out.ndim && out.stride[out.ndim - 1] == size * stride) {
      out.shape[out.ndim - 1] *= size;
      out.stride[out.ndim - 1] = stride;
      return;
    }
    if (out.ndim == kMaxDims) throw std::runtime_error("too many dimensions that do not merge");
    out.shape[out.ndim] = size;
    out.stride[out.ndim++] = stride;
  };
  for (const Dim& dim : order_) append(dim.size, strides[dim.index] * parts_);
  if (parts_ == 2) append(2, 1);
  if (out.ndim == 1 && out.stride[0] == 1) out.ndim = 0;
  return out;
}

}  // namespace fusedopt::host
