// Where torch keeps a tensor's address, found out at import instead of compiled in.
//
// Asking torch for a tensor's address costs ~30 ns plus its cache misses, and a step must know that
// none of its parameters and states has moved since the last one. So at import we look, in tensors
// whose facts torch tells us, at which offsets those facts stand: Python object -> TensorImpl ->
// StorageImpl -> data, and in the TensorImpl the storage offset, dimensions, dispatch keys and dtype. Exactly one
// offset must fit all of them; otherwise `known` stays false and every question goes through DLPack. Nothing here is
// ever written to.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedopt::host {

// One tensor's facts, as torch tells them.
struct Specimen {
  PyObject* tensor;
  std::uintptr_t impl, storage, data;
  std::int64_t offset;  // storage_offset, in elements
  std::uint64_t keys;   // the dispatch key set
  int dtype;            // any number that tells dtypes apart
  std::vector<std::int64_t> shape, stride;
};

class Anatomy {
 public:
  static constexpr int kInlineDims = 5;  // more than these live elsewhere

  // Device, layout, laziness and dtype of a tensor, to compare with those of one that DLPack described.
  struct Kind {
    std::uint64_t keys = 0;
    std::uint16_t dtype = 0;
    bool operator==(const Kind&) const = default;
  };

  void learn(const std::vector<Specimen>& specimens);
  bool known() const { return known_; }

  // The address of the first element.
  const char* address(PyObject* tensor, int item_size) const {
    const char* impl = follow(reinterpret_cast<const char*>(tensor) + impl_);
    const char* data = follow(follow(impl + storage_) + data_);
    return data + integer(impl + offset_) * item_size;
  }

  // Whether shape and strides are still these. ndim <= kInlineDims.
  bool has_dims(PyObject* tensor, int ndim, const std::int64_t* shape_then_stride) const {
    const char* dims = follow(reinterpret_cast<const char*>(tensor) + impl_) + dims_;
    if (integer(dims) != ndim) return false;
    for (int d = 0; d < ndim; ++d) {
      if (integer(dims + 8 * (1 + d)) != shape_then_stride[d]) return false;
      if (integer(dims + 8 * (1 + kInlineDims + d)) != shape_then_stride[ndim + d]) return false;
    }
    return true;
  }

  Kind kind(PyObject* tensor) const {
    const char* impl = follow(reinterpret_cast<const char*>(tensor) + impl_);
    return {static_cast<std::uint64_t>(integer(impl + keys_)), *reinterpret_cast<const std::uint16_t*>(impl + dtype_)};
  }

  // Where one tensor's parts lie. To prefetch, never to follow: the tensor may be gone.
  struct Places {
    const void* object;
    const char* impl;
    const char* storage;
  };
  Places places(PyObject* tensor) const {
    const char* impl = follow(reinterpret_cast<const char*>(tensor) + impl_);
    return {tensor, impl, follow(impl + storage_)};
  }
  static void prefetch(const Places& at) {
    __builtin_prefetch(at.object);
    prefetch_lines(at.impl);
    __builtin_prefetch(at.storage);
  }

  // Of a live tensor, in two stages: its object must be in cache for the first, its impl for the second.
  void prefetch_impl(PyObject* tensor) const {
    if (!known_) return;
    prefetch_lines(follow(reinterpret_cast<const char*>(tensor) + impl_));
  }
  void prefetch_address(PyObject* tensor) const {  // no more of the impl than `address` reads
    if (!known_) return;
    const char* impl = follow(reinterpret_cast<const char*>(tensor) + impl_);
    __builtin_prefetch(impl + storage_);
    __builtin_prefetch(impl + offset_);
  }
  void prefetch_storage(PyObject* tensor) const {
    if (!known_) return;
    const char* impl = follow(reinterpret_cast<const char*>(tensor) + impl_);
    __builtin_prefetch(follow(impl + storage_) + data_);
    // What follows the storage is the autograd metadata, which has the gradient; if not, no harm is done.
    const char* autograd = follow(impl + storage_ + 8);
    __builtin_prefetch(autograd);
    __builtin_prefetch(autograd + 64);
  }

 private:
  static const char* follow(const char* at) { return *reinterpret_cast<const char* const*>(at); }
  static void prefetch_lines(const char* impl) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(impl + 64 * line);
  }
  static std::int64_t integer(const char* at) { return *reinterpret_cast<const std::int64_t*>(at); }

  bool known_ = false;
  std::ptrdiff_t impl_ = 0, storage_ = 0, data_ = 0, offset_ = 0, dims_ = 0, keys_ = 0, dtype_ = 0;
};

extern Anatomy anatomy;

}  // namespace fusedopt::host
