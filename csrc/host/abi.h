// torch's stable C ABI, as far as a step needs it, and what it says of a tensor.
//
// The functions are looked up at run time in the libtorch that is loaded, so that one binary serves every torch. They
// take a handle, which is the address of an at::Tensor; a Python tensor holds one right after PyObject_HEAD, which is
// verified at import (fusedopt/host.py). Nothing here knows Python: it may be called without the GIL, by many threads.
#pragma once

#include <cstdint>
#include <functional>

#include "host/written_memory.h"

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

// Where torch keeps the parts of a tensor. Only ever used to prefetch them, so it need not be true: the misses of many
// small tensors overlap when each is brought into cache some tensors ahead, and none of them waits for another.
// Inlined by force: gcc takes a function that does nothing but prefetch for one without effect, and drops its calls.
struct Parts {
  const char* impl = nullptr;
  const char* storage = nullptr;
  const char* autograd = nullptr;

  [[gnu::always_inline]] void prefetch_impl() const {  // what the getters read ends 175 bytes from where it begins
    __builtin_prefetch(impl);
    __builtin_prefetch(impl + 64);
    __builtin_prefetch(impl + 128);
    __builtin_prefetch(impl + 175);
  }
  [[gnu::always_inline]] void prefetch_storage() const {
    __builtin_prefetch(storage + 16);
    __builtin_prefetch(storage + 60);
  }
  // What is read to find a tensor's gradient; of the gradient itself, only what tells its Python object.
  [[gnu::always_inline]] void prefetch_to_gradient() const {
    __builtin_prefetch(impl);
    __builtin_prefetch(impl + 64);
    __builtin_prefetch(autograd);
    __builtin_prefetch(autograd + 64);
  }
};

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
  Status (*get_is_defined)(Handle, bool*);
  // The C ABI does not tell these. The first two are at::native's, which take a reference to the same at::Tensor; then
  // c10's, which takes and returns what a handle points to and a handle; and whether torch is told to run Python when
  // a tensor's gradient is asked for in Python.
  bool (*is_conj)(Handle);
  bool (*is_neg)(Handle);
  Handle (*get_gradient)(const void* impl);
  bool (*has_function_mode)();
  // Of autograd's, which throws for inference tensors; null where libtorch has none.
  void (*bump_version)(Handle) = nullptr;
  std::int32_t strided, cpu;  // its numbers for a layout and a device, of which there is one

  // Where the address of its storage stands in what a handle points to, in bytes, if that was found; what follows it
  // has the gradient.
  std::int32_t storage_hint = -1;

  // The Python class of a Python tensor: the last word of PyObject_HEAD, which is before the handle.
  static const void* class_of(Handle tensor) { return static_cast<const void* const*>(tensor)[-1]; }
  // Where the parts of a live tensor are now.
  Parts parts(Handle tensor) const;
  // Its gradient, which lives as long as the tensor has it; not defined where there is none.
  Handle gradient(Handle tensor) const { return get_gradient(*static_cast<const void* const*>(tensor)); }

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
  const void* type;  // its Python class
  Parts parts = {};
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
  Parts parts = {};  // of the last one
};

// All tensors and gradients of a plan.
struct Inspection {
  const Abi& abi;
  const Expectation* tensors;
  std::int64_t n_tensors;
  GradientExpectation* like;     // one for each gradient
  const Abi::Handle* gradients;  // null: there is none
  const void** addresses;  // out: null where a gradient is not as expected, has no elements or reaches into `written`
  std::int64_t n_gradients;
  const std::int64_t* dims;
  const WrittenMemory& written;
};

// Whether all tensors are what they were, and `meanwhile` returned true; fills in the gradients' addresses. The calling
// thread first does `meanwhile`, which may fill in the gradients, while others look at the tensors.
//
// Several threads may only share the work if no two of the planned storages overlap: torch is asked for a writable
// address, which is not safe for two threads in one storage, after all else was found equal.
bool inspect(const Inspection& inspection, int threads, const std::function<bool()>& meanwhile);

}  // namespace fusedopt::host
