#include "host/abi.h"

#include <omp.h>

#include <algorithm>
#include <atomic>

namespace fusedopt::host {
namespace {

constexpr std::int64_t kTensorsAhead = 8;  // to prefetch: 4 to 32 are as good
constexpr std::int64_t kBlock = 128;       // tensors that a thread takes at a time

bool has_dims(const Abi& abi, Abi::Handle tensor, int ndim, const std::int64_t* shape, const std::int64_t* strides) {
  std::int64_t now;
  if (abi.get_dim(tensor, &now) || now != ndim) return false;
  if (!ndim) return true;
  std::int64_t *sizes, *steps;
  if (abi.get_sizes(tensor, &sizes) || !std::equal(sizes, sizes + ndim, shape)) return false;
  return !abi.get_strides(tensor, &steps) && std::equal(steps, steps + ndim, strides);
}

bool is_on(const Abi& abi, Abi::Handle tensor, std::int32_t device_type, std::int32_t device_index) {
  std::int32_t device, index;
  if (abi.get_device_type(tensor, &device) || device != device_type) return false;
  return device == abi.cpu || (!abi.get_device_index(tensor, &index) && index == device_index);
}

// Whether a tensor is what it was. What has no storage, as sparse tensors, fails when its size is asked for. The device
// need not be asked: the address is one of it alone.
bool is_unchanged(const Abi& abi, const Expectation& was, const std::int64_t* dims, bool alone) {
  if (Abi::class_of(was.tensor) != was.type) return false;  // before anything is asked: a wrapper's size runs Python
  const std::int64_t* const shape = dims + was.dims;
  std::int64_t bytes;
  std::int32_t dtype;
  if (!has_dims(abi, was.tensor, was.ndim, shape, shape + was.ndim)) return false;
  if (abi.get_dtype(was.tensor, &dtype) || dtype != was.dtype) return false;
  if (abi.get_storage_size(was.tensor, &bytes) || bytes != was.storage_bytes) return false;
  if (abi.is_neg(was.tensor) || (was.is_complex && abi.is_conj(was.tensor))) return false;
  const void* address;
  if (!alone && (abi.get_const_data_ptr(was.tensor, &address) || address != was.address)) return false;
  void* writable;
  return !abi.get_data_ptr(was.tensor, &writable) && writable == was.address;
}

// The address of a gradient that is as expected; null if it is not, or has no elements, or reaches into what is
// written.
const void* fitting_address(const Inspection& all, Abi::Handle gradient, GradientExpectation& like) {
  const Abi& abi = all.abi;
  const std::int64_t* const dims = all.dims;
  std::int32_t dtype;
  std::int64_t bytes, offset;
  const void* address;
  if (!has_dims(abi, gradient, like.ndim, dims + like.shape, dims + like.strides)) return nullptr;
  if (abi.get_dtype(gradient, &dtype) || dtype != like.dtype) return nullptr;
  if (!is_on(abi, gradient, like.device_type, like.device_index)) return nullptr;
  if (abi.get_storage_size(gradient, &bytes) || abi.get_const_data_ptr(gradient, &address)) return nullptr;
  if (address == like.address && bytes == like.storage_bytes) return address;
  if (abi.get_storage_offset(gradient, &offset) || offset * like.item_size + like.reach > bytes) return nullptr;
  if (all.written.meets(address, like.reach)) return nullptr;
  like.address = address;
  like.storage_bytes = bytes;
  return address;
}

}  // namespace

std::int64_t Geometry::numel() const {
  std::int64_t n = 1;
  for (int d = 0; d < ndim; ++d) n *= shape[d];
  return n;
}

std::int64_t Geometry::reach(int item_size) const {
  std::int64_t last = 0;
  for (int d = 0; d < ndim; ++d) {
    if (!shape[d]) return 0;
    last += (shape[d] - 1) * strides[d];
  }
  return (last + 1) * item_size;
}

bool Geometry::has_memory(int item_size) const {
  const std::int64_t needed = reach(item_size);
  return !needed || (address && storage_offset * item_size + needed <= storage_bytes);
}

Parts Abi::parts(Handle tensor) const {
  const char* const impl = *static_cast<const char* const*>(tensor);
  if (storage_hint < 0) return {impl, nullptr, nullptr};
  const auto* const words = reinterpret_cast<const char* const*>(impl + storage_hint);
  return {impl, words[0], words[1]};
}

bool Abi::read(Handle tensor, Access access, Geometry* out) const {
  std::int32_t layout;
  std::int64_t ndim;
  std::int64_t *shape, *strides;
  if (get_layout(tensor, &layout) || layout != strided) return false;
  if (get_dim(tensor, &ndim) || get_sizes(tensor, &shape) || get_strides(tensor, &strides)) return false;
  if (get_dtype(tensor, &out->dtype) || get_device_type(tensor, &out->device_type) ||
      get_device_index(tensor, &out->device_index) || get_storage_size(tensor, &out->storage_bytes) ||
      get_storage_offset(tensor, &out->storage_offset)) {
    return false;
  }
  out->ndim = static_cast<std::int32_t>(ndim);
  out->shape = shape;
  out->strides = strides;
  out->conjugated = is_conj(tensor);
  out->negated = is_neg(tensor);
  if (access == Access::kWrite) return !get_data_ptr(tensor, &out->address);
  const void* address;
  if (get_const_data_ptr(tensor, &address)) return false;
  out->address = const_cast<void*>(address);
  return true;
}

bool inspect(const Inspection& all, int threads, const std::function<bool()>& meanwhile) {
  const Abi& abi = all.abi;
  std::atomic<bool> valid{true};
  const auto tensor_block = [&](std::int64_t b) {
    const std::int64_t end = std::min(all.n_tensors, (b + 1) * kBlock);
    for (std::int64_t i = b * kBlock; i < end && valid.load(std::memory_order_relaxed); ++i) {
      if (i + kTensorsAhead < all.n_tensors) {
        const Expectation& later = all.tensors[i + kTensorsAhead];
        __builtin_prefetch(later.tensor);
        later.parts.prefetch_impl();
        later.parts.prefetch_storage();
      }
      if (!is_unchanged(abi, all.tensors[i], all.dims, threads == 1)) valid.store(false, std::memory_order_relaxed);
    }
  };
  const auto gradient_block = [&](std::int64_t b) {
    const std::int64_t end = std::min(all.n_gradients, (b + 1) * kBlock);
    for (std::int64_t i = b * kBlock; i < end; ++i) {
      if (i + 2 * kTensorsAhead < all.n_gradients) {
        __builtin_prefetch(all.gradients[i + 2 * kTensorsAhead]);
        all.like[i + 2 * kTensorsAhead].parts.prefetch_impl();
      }
      if (i + kTensorsAhead < all.n_gradients && all.gradients[i + kTensorsAhead]) {
        abi.parts(all.gradients[i + kTensorsAhead]).prefetch_storage();
      }
      const Abi::Handle gradient = all.gradients[i];
      all.addresses[i] = gradient ? fitting_address(all, gradient, all.like[i]) : nullptr;
    }
  };
  const std::int64_t tensor_blocks = (all.n_tensors + kBlock - 1) / kBlock;
  const std::int64_t gradient_blocks = (all.n_gradients + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (!omp_get_thread_num() && !meanwhile()) valid.store(false, std::memory_order_relaxed);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t b = 0; b < tensor_blocks; ++b) tensor_block(b);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t b = 0; b < gradient_blocks; ++b) {
      if (valid.load(std::memory_order_relaxed)) gradient_block(b);
    }
  }
  return valid;
}

}  // namespace fusedopt::host
