#include "host/geometry.h"

#include <algorithm>
#include <stdexcept>

namespace fusedopt::host {

Geometry::Geometry(const DLTensor& t, const std::int64_t* stride) : parts_(is_complex(t) ? 2 : 1), numel_(parts_) {
  for (int d = 0; d < t.ndim; ++d) {
    numel_ *= t.shape[d];
    if (t.shape[d] != 1) order_.push_back(d);
  }
  std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return stride[a] > stride[b]; });
}

Layout Geometry::layout_of(const DLTensor& t) const {
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
  for (const int d : order_) append(t.shape[d], t.strides[d] * parts_);
  if (parts_ == 2) append(2, 1);
  if (out.ndim == 1 && out.stride[0] == 1) out.ndim = 0;
  return out;
}

}  // namespace fusedopt::host
