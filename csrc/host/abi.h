// torch's stable C ABI, as far as a step needs it, and what it says of a tensor.
//
// The functions are looked up at run time in the libtorch that is loaded, so that one binary serves every torch. They
// take a handle, which is the address of an at::Tensor; a Python tensor holds one right after PyObject_HEAD, which is
// verified at import (fusedopt/host.py). Nothing here knows Python: it may be called without the GIL, by many threads.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace fusedopt::host {

// What torch says of a tensor's memory.
struct Geometry {
  void* address = nullptr;  // of the first element
  std::int64_t storage_bytes = 0;
  std::int64_t storage_offset = 0;        // in elements
  const std::int64_t* shape = nullptr;    // torch's own, as long as nobody changes the tensor
  const std::int64_t* strides = nullptr;  // in elements
  std::int32_t ndim = 0;
  std::int32_t dtype = 0;  // a number that tells dtypes apart
  std::int32_t device_type = 0, device_index = 0;
  bool conjugated = false, negated = false;  // lazily

  std::int64_t numel() const;
  // How many bytes of the storage its elements reach over, from the first element on. Negative strides don't exist.
  std::int64_t reach(int item_size) const;
  // Every element lies in the storage.
  bool has_memory(int item_size) const;
};

// What is asked of a tensor's address. Asking for a writable one makes a lazy clone a copy of its own.
enum class Access { kRead, kWrite };

struct Abi {
  using Handle = void*;
  using Status = std::int32_t;

  Status (*get_layout)(Handle, std::int32_t*);
  Status (*get_dim)(Handle, std::int64_t*);
  Status (*get_sizes)(Handle, std::int64_t**);
  Status (*get_strides)(Handle, std::int64_t**);
  Status (*get_dtype)(Handle, std::int32_t*);
  Status (*get_device_type)(Handle, std::int32_t*);
  Status (*get_device_index)(Handle, std::int32_t*);
  Status (*get_storage_size)(Handle, std::int64_t*);
  Status (*get_storage_offset)(Handle, std::int64_t*);
  Status (*get_const_data_ptr)(Handle, const void**);
  Status (*get_data_ptr)(Handle, void**);
  // The C ABI does not tell these; they are at::native's own, which take a reference to the same at::Tensor.
  bool (*is_conj)(Handle);
  bool (*is_neg)(Handle);
  std::int32_t strided, cpu;  // its numbers for a layout and a device, of which there is one

  // Where the address of its storage stands in what a handle points to, in bytes, if that was found; what follows it
  // has the gradient. Only ever used to prefetch.
  std::int32_t storage_hint = -1;

  // Brings a live tensor into cache, in three stages some tensors apart: each needs the one before.
  static void prefetch_object(Handle tensor) { __builtin_prefetch(tensor); }
  static void prefetch_impl(Handle tensor) {
    const char* impl = *static_cast<const char* const*>(tensor);
    for (const int at : {0, 64, 128, 175}) __builtin_prefetch(impl + at);  // what the getters read ends there
  }
  void prefetch_storage(Handle tensor) const {
    const auto* words = *static_cast<const char* const* const*>(tensor);
    if (storage_hint < 0) return;
    __builtin_prefetch(words[storage_hint / 8]);
    __builtin_prefetch(words[storage_hint / 8] + 64);
  }
  void prefetch_autograd(Handle tensor) const {
    const auto* words = *static_cast<const char* const* const*>(tensor);
    if (storage_hint < 0) return;
    __builtin_prefetch(words[storage_hint / 8 + 1]);
    __builtin_prefetch(words[storage_hint / 8 + 1] + 64);
  }

  // False for what has no strided memory: sparse tensors, wrappers.
  bool read(Handle tensor, Access access, Geometry* out) const;
};

// What a planned tensor must still be.
struct Expectation {
  Abi::Handle tensor;
  void* address;
  std::int64_t storage_bytes;
  std::uint32_t dims;  // where its shape and strides stand
  std::int32_t dtype;
  std::int16_t device_type, device_index;
  std::int32_t ndim;
  bool is_complex;
};

// A gradient and what it must be like to be read where it is; its address is another one in each step.
struct GradientExpectation {
  const void* address;         // where one was found to fit last, and the size of its storage: then it need not be
  std::int64_t storage_bytes;  // looked at where in the storage it is
  std::int64_t reach;          // bytes
  std::uint32_t shape, strides;
  std::int32_t dtype;
  std::int16_t device_type, device_index;
  std::int32_t ndim;
  std::int8_t item_size;
};

// All tensors and gradients of a plan.
struct Inspection {
  const Abi& abi;
  const Expectation* tensors;
  std::int64_t n_tensors;
  GradientExpectation* like;     // one for each gradient
  const Abi::Handle* gradients;  // null: there is none
  const void** addresses;        // out: null where a gradient is not as expected, or has no elements
  std::int64_t n_gradients;
  const std::int64_t* dims;
};

// Whether all tensors are what they were; fills in the gradients' addresses. Several threads may only share the work if
// no two of the planned storages overlap: torch is asked for a writable address, which is not safe for two threads in
// one storage, after all else was found equal.
bool inspect(const Inspection& inspection, int threads);

}  // namespace fusedopt::host
