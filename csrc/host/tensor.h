// Reads torch tensors through DLPack's C exchange API, without linking torch.
#pragma once

#include <Python.h>

#include <cstdint>

#include FUSEDOPT_DLPACK_HEADER

#include "core/job.h"

namespace fusedopt::host {

// Set once at import from `torch.Tensor.__dlpack_c_exchange_api__` and the descriptor of `Tensor.grad`.
class Torch {
 public:
  void bind(PyObject* tensor_type, PyObject* parameter_type, PyObject* capsule, PyObject* grad_descriptor);

  // False, with a Python error set, for what DLPack cannot describe (sparse, meta, ...).
  bool view(PyObject* tensor, DLTensor* out) const {
    return exchange_->dltensor_from_py_object_no_sync(tensor, out) == 0;
  }

  // New reference; null with a Python error set.
  PyObject* grad(PyObject* tensor) const;

  bool is_plain(PyObject* tensor) const {
    return Py_TYPE(tensor) == tensor_type_ || Py_TYPE(tensor) == parameter_type_;
  }

 private:
  const DLPackExchangeAPI* exchange_ = nullptr;
  PyTypeObject* tensor_type_ = nullptr;
  PyTypeObject* parameter_type_ = nullptr;
  PyObject* grad_descriptor_ = nullptr;
  PyObject* grad_name_ = nullptr;
};

extern Torch torch;

inline char* address(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

inline bool is_complex(const DLTensor& t) { return t.dtype.code == kDLComplex; }

// The element type, or of a complex tensor the type of its parts. Throws for types no engine steps.
DType element_type(const DLTensor& t);

}  // namespace fusedopt::host
