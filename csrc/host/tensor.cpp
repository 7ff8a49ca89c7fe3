#include "host/tensor.h"

#include <stdexcept>

namespace fusedopt::host {

Torch torch;

void Torch::bind(PyObject* tensor_type, PyObject* parameter_type, PyObject* capsule, PyObject* grad_descriptor) {
  void* api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!api) throw std::runtime_error("torch's DLPack exchange capsule has another name");
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(api);
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync) {
    throw std::runtime_error("torch speaks another major version of DLPack");
  }
  if (!Py_TYPE(grad_descriptor)->tp_descr_get) throw std::runtime_error("Tensor.grad is not a descriptor");
  exchange_ = exchange;
  tensor_type_ = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor_type));
  parameter_type_ = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter_type));
  grad_descriptor_ = Py_NewRef(grad_descriptor);
  grad_name_ = PyUnicode_InternFromString("grad");
}

PyObject* Torch::grad(PyObject* tensor) const {
  if (!is_plain(tensor)) return PyObject_GetAttr(tensor, grad_name_);
  return Py_TYPE(grad_descriptor_)
      ->tp_descr_get(grad_descriptor_, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

DType element_type(const DLTensor& t) {
  const int bits = is_complex(t) ? t.dtype.bits / 2 : t.dtype.bits;
  if (t.dtype.code == kDLBfloat && bits == 16) return DType::bf16;
  if (t.dtype.code == kDLFloat || is_complex(t)) {
    if (bits == 16) return DType::f16;
    if (bits == 32) return DType::f32;
    if (bits == 64) return DType::f64;
  }
  throw std::runtime_error("unsupported element type");
}

}  // namespace fusedopt::host
