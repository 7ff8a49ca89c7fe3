// Reads torch's Python tensors without linking torch: through its C ABI, or where that cannot be had through DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>

#include FUSEDOPT_DLPACK_HEADER

#include "core/operands.h"
#include "host/abi.h"

namespace fusedopt::host {

namespace py = pybind11;

// What is bound once, when the extension is first used.
class Torch {
 public:
  // Names of `names`: tensor_type, parameter_type, grad (the descriptor), dispatch (what a class without dispatch of
  // its own has for __torch_dispatch__), exchange_api (a capsule), number (float of a hyperparameter, or an exception),
  // increment_version (torch's, of a list of tensors).
  void bind(const py::dict& names);
  // Addresses of the functions of the ABI and of `is_conj` and `is_neg`, and its numbers for dtypes and layouts.
  // Returns whether the handles in `probes` are where they are expected; nothing is called before that is known.
  bool bind_abi(const py::dict& addresses, const py::dict& numbers, const py::list& probes);
  void forget_abi() { abi_.reset(); }
  // The class of tensors that are spread over ranks (torch's DTensor). Slots of theirs have the part that is here,
  // which is a tensor, and how they are spread.
  void bind_dtensor(const py::type& type) { dtensor_type_ = reinterpret_cast<PyTypeObject*>(Py_NewRef(type.ptr())); }
  const Abi* abi() const { return abi_ ? &*abi_ : nullptr; }

  // False where a tensor has no strided memory, or cannot be read, as lazily conjugated and negated ones through
  // DLPack. A Python error is only left of Ctrl-C and the like.
  bool read(PyObject* tensor, Access access, Geometry* out) const;

  // What the handle of a tensor's gradient points to; 0 without one, or without the ABI.
  std::uintptr_t gradient_of(PyObject* tensor) const;
  // New reference; null with a Python error. May run Python.
  PyObject* grad(PyObject* tensor) const;
  // A gradient without lazy bits, as its memory is read. Steals and returns a reference; null with a Python error.
  PyObject* resolved(PyObject* gradient, bool is_complex) const;
  // A number, as hyperparameters are; false with a Python error. May run Python.
  bool number(PyObject* value, double* out) const;

  // Tells autograd that a tensor was written. False where the ABI cannot.
  bool increment_version(PyObject* tensor) const {
    if (!abi_ || !abi_->bump_version) return false;
    try {
      abi_->bump_version(handle(tensor));
    } catch (const std::exception&) {  // made in inference mode, it has no version
    }
    return true;
  }
  // The same, in Python.
  void increment_versions(const py::list& tensors) const { py::handle(increment_version_)(tensors); }

  bool is_tensor(PyObject* object) const { return is_plain(object) || PyObject_TypeCheck(object, tensor_type_); }
  bool is_plain(PyObject* tensor) const {
    return Py_TYPE(tensor) == tensor_type_ || Py_TYPE(tensor) == parameter_type_;
  }
  bool is_dtensor(PyObject* tensor) const { return dtensor_type_ && PyObject_TypeCheck(tensor, dtensor_type_); }
  // Reading it, or what it has, runs no Python.
  bool is_silent(PyObject* tensor) const {
    return is_plain(tensor) || (dtensor_type_ && Py_TYPE(tensor) == dtensor_type_);
  }
  // The part that is here of a tensor that is spread over ranks, and how it is spread. New references; null with a
  // Python error.
  PyObject* local(PyObject* dtensor) const;
  PyObject* placement(PyObject* dtensor) const;
  // Whether two tensors are spread over the same ranks in the same way; perhaps with a Python error if not. Runs
  // Python.
  bool is_same_placement(PyObject* a, PyObject* b) const;
  bool is_readable(PyObject* object) const { return is_tensor(object) && has_no_dispatch(object); }
  // Lazily conjugated or negated, as the ABI tells it.
  bool is_lazy(PyObject* tensor, bool is_complex) const {
    return abi_->is_neg(handle(tensor)) || (is_complex && abi_->is_conj(handle(tensor)));
  }
  // Operations on it are torch's own: it has memory, and what its memory holds is what it is.
  bool has_no_dispatch(PyObject* tensor) const;

  // Of Geometry::dtype. Empty for types that no engine steps.
  std::optional<DType> element_type(std::int32_t dtype) const;
  bool is_complex(std::int32_t dtype) const;
  // Bytes of an element; of a complex one both parts.
  int item_size(std::int32_t dtype) const;

  static Abi::Handle handle(PyObject* tensor) { return reinterpret_cast<char*>(tensor) + sizeof(PyObject); }
  static PyObject* object(Abi::Handle tensor) {
    return reinterpret_cast<PyObject*>(static_cast<char*>(tensor) - sizeof(PyObject));
  }

 private:
  struct Type {
    DType parts;
    bool complex;
  };
  const Type* type_of(std::int32_t dtype) const;
  bool read_by_dlpack(PyObject* tensor, Geometry* out) const;

  std::optional<Abi> abi_;
  static constexpr int kNumbers = 128;
  std::optional<Type> types_[kNumbers];  // by the ABI's numbers
  const DLPackExchangeAPI* exchange_ = nullptr;
  PyTypeObject* tensor_type_ = nullptr;
  PyTypeObject* parameter_type_ = nullptr;
  PyTypeObject* dtensor_type_ = nullptr;
  PyObject* grad_descriptor_ = nullptr;
  PyObject* dispatch_ = nullptr;
  PyObject* number_ = nullptr;
  PyObject* increment_version_ = nullptr;
};

extern Torch torch;

}  // namespace fusedopt::host
