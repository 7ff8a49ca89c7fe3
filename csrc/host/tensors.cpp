#include "host/tensors.h"

#include <stdexcept>

namespace fusedopt::host {

Torch torch;

namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// Forgets an exception, but not Ctrl-C and the like.
void forget_error() {
  if (PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear();
}

// What a method without arguments answers; empty where it raises.
py::object ask(PyObject* object, const char* method) {
  PyObject* answer = PyErr_Occurred() ? nullptr : PyObject_CallMethod(object, method, nullptr);
  if (!answer) forget_error();
  return py::reinterpret_steal<py::object>(answer);
}

bool ask_integer(PyObject* object, const char* method, std::int64_t* out) {
  const py::object answer = ask(object, method);
  if (!answer) return false;
  *out = PyLong_AsLongLong(answer.ptr());
  if (*out != -1 || !PyErr_Occurred()) return true;
  forget_error();
  return false;
}

template <class Function>
void look_up(const py::dict& addresses, const char* name, Function* out) {
  *out = reinterpret_cast<Function>(addresses[name].cast<std::uintptr_t>());
}

// Where all probes have their storages' addresses; -1 if that is not in one place of the first words.
std::int32_t storage_hint(const py::list& probes) {
  for (std::int32_t at = 8; at < 64; at += 8) {
    bool fits = true;
    for (const py::handle probe : probes) {
      const char* const impl = *static_cast<const char* const*>(Torch::handle(probe.ptr()));
      const auto storage = probe.attr("untyped_storage")().attr("_cdata").cast<std::uintptr_t>();
      fits &= *reinterpret_cast<const std::uintptr_t*>(impl + at) == storage;
    }
    if (fits) return at;
  }
  return -1;
}

constexpr int kDlpackDtype = 1 << 16;  // these numbers are DLPack's code and bits

}  // namespace

void Torch::bind(const py::dict& names) {
  const auto keep = [&](const char* name) { return Py_NewRef(py::object(names[name]).ptr()); };
  void* api = PyCapsule_GetPointer(py::object(names["exchange_api"]).ptr(), "dlpack_exchange_api");
  if (!api) throw py::error_already_set();
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(api);
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync) {
    throw std::runtime_error("torch speaks another major version of DLPack");
  }
  exchange_ = exchange;
  tensor_type_ = reinterpret_cast<PyTypeObject*>(keep("tensor_type"));
  parameter_type_ = reinterpret_cast<PyTypeObject*>(keep("parameter_type"));
  grad_descriptor_ = keep("grad");
  dispatch_ = keep("dispatch");
  number_ = keep("number");
  increment_version_ = keep("increment_version");
  if (!Py_TYPE(grad_descriptor_)->tp_descr_get) throw std::runtime_error("Tensor.grad is not a descriptor");
}

bool Torch::bind_abi(const py::dict& addresses, const py::dict& numbers, const py::list& probes) {
  forget_abi();
  for (const py::handle probe : probes) {
    const auto impl = probe.attr("_cdata").cast<std::uintptr_t>();
    const bool has_room =
        Py_TYPE(probe.ptr())->tp_basicsize >= static_cast<Py_ssize_t>(sizeof(PyObject) + sizeof(impl));
    if (!has_room || *static_cast<const std::uintptr_t*>(handle(probe.ptr())) != impl) return false;
  }
  Abi abi;
  look_up(addresses, "aoti_torch_get_layout", &abi.get_layout);
  look_up(addresses, "aoti_torch_get_dim", &abi.get_dim);
  look_up(addresses, "aoti_torch_get_sizes", &abi.get_sizes);
  look_up(addresses, "aoti_torch_get_strides", &abi.get_strides);
  look_up(addresses, "aoti_torch_get_dtype", &abi.get_dtype);
  look_up(addresses, "aoti_torch_get_device_type", &abi.get_device_type);
  look_up(addresses, "aoti_torch_get_device_index", &abi.get_device_index);
  look_up(addresses, "aoti_torch_get_storage_size", &abi.get_storage_size);
  look_up(addresses, "aoti_torch_get_storage_offset", &abi.get_storage_offset);
  look_up(addresses, "torch_get_const_data_ptr", &abi.get_const_data_ptr);
  look_up(addresses, "aoti_torch_get_data_ptr", &abi.get_data_ptr);
  look_up(addresses, "is_conj", &abi.is_conj);
  look_up(addresses, "is_neg", &abi.is_neg);
  look_up(addresses, "gradient", &abi.get_gradient);
  look_up(addresses, "has_function_mode", &abi.has_function_mode);
  look_up(addresses, "aoti_torch_is_defined", &abi.get_is_defined);
  if (addresses.contains("bump_version")) look_up(addresses, "bump_version", &abi.bump_version);
  abi.strided = numbers["strided"].cast<std::int32_t>();
  abi.cpu = numbers["cpu"].cast<std::int32_t>();
  const auto enter = [&](const char* name, Type type) { types_[numbers[name].cast<std::size_t>() % kNumbers] = type; };
  enter("float32", {DType::f32, false});
  enter("float64", {DType::f64, false});
  enter("bfloat16", {DType::bf16, false});
  enter("float16", {DType::f16, false});
  enter("uint8", {DType::u8, false});
  enter("complex64", {DType::f32, true});
  enter("complex128", {DType::f64, true});
  enter("complex32", {DType::f16, true});
  abi.storage_hint = storage_hint(probes);
  abi_ = abi;
  return true;
}

bool Torch::read(PyObject* tensor, Access access, Geometry* out) const {
  return abi_ ? abi_->read(handle(tensor), access, out) : read_by_dlpack(tensor, out);
}

// DLPack describes memory without lazy bits and without the storage's size, so these are asked in Python.
bool Torch::read_by_dlpack(PyObject* tensor, Geometry* out) const {
  for (const char* method : {"is_conj", "is_neg"}) {
    if (ask(tensor, method).ptr() != Py_False) return false;
  }
  // Asked first: it is what makes a lazy clone a copy of its own, and refuses what has no memory.
  std::int64_t address;
  if (!ask_integer(tensor, "data_ptr", &address)) return false;
  const py::object storage = ask(tensor, "untyped_storage");
  if (!storage || !ask_integer(storage.ptr(), "nbytes", &out->storage_bytes)) return false;
  if (!ask_integer(tensor, "storage_offset", &out->storage_offset)) return false;
  DLTensor t;
  if (exchange_->dltensor_from_py_object_no_sync(tensor, &t) != 0) {
    forget_error();
    return false;
  }
  out->address = reinterpret_cast<void*>(address);
  out->ndim = t.ndim;
  out->shape = t.shape;
  out->strides = t.strides;
  out->dtype = kDlpackDtype | t.dtype.code << 8 | t.dtype.bits;
  out->device_type = t.device.device_type;
  out->device_index = t.device.device_id;
  return true;
}

std::uintptr_t Torch::gradient_of(PyObject* tensor) const {
  bool is_defined;
  if (!abi_ || abi_->get_is_defined(abi_->gradient(handle(tensor)), &is_defined) || !is_defined) return 0;
  return *static_cast<const std::uintptr_t*>(abi_->gradient(handle(tensor)));
}

PyObject* Torch::local(PyObject* dtensor) const {
  static PyObject* const name = interned("_local_tensor");
  return PyObject_GetAttr(dtensor, name);
}

PyObject* Torch::placement(PyObject* dtensor) const {
  static PyObject* const name = interned("_spec");
  return PyObject_GetAttr(dtensor, name);
}

bool Torch::is_same_placement(PyObject* a, PyObject* b) const {
  for (const char* part : {"mesh", "placements"}) {
    const auto of_a = py::reinterpret_steal<py::object>(PyObject_GetAttrString(a, part));
    const auto of_b = of_a ? py::reinterpret_steal<py::object>(PyObject_GetAttrString(b, part)) : py::object();
    if (!of_b || PyObject_RichCompareBool(of_a.ptr(), of_b.ptr(), Py_EQ) != 1) return false;
  }
  return true;
}

PyObject* Torch::grad(PyObject* tensor) const {
  static PyObject* const name = interned("grad");
  if (!is_silent(tensor)) return PyObject_GetAttr(tensor, name);
  return Py_TYPE(grad_descriptor_)
      ->tp_descr_get(grad_descriptor_, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

PyObject* Torch::resolved(PyObject* gradient, bool is_complex) const {
  if (abi_ && is_plain(gradient) && !is_lazy(gradient, is_complex)) return gradient;
  for (const char* method : {"resolve_conj", "resolve_neg"}) {
    PyObject* next = PyObject_CallMethod(gradient, method, nullptr);
    Py_DECREF(gradient);
    if (!next) return nullptr;
    gradient = next;
  }
  return gradient;
}

bool Torch::number(PyObject* value, double* out) const {
  if (PyFloat_CheckExact(value)) {
    *out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  const auto held = py::reinterpret_borrow<py::object>(value);  // what it runs may replace it
  const auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(number_, value));
  if (!result) return false;
  *out = PyFloat_AsDouble(result.ptr());
  return !PyErr_Occurred();
}

bool Torch::has_no_dispatch(PyObject* tensor) const {
  static PyObject* const name = interned("__torch_dispatch__");
  if (is_plain(tensor)) return true;
  PyObject* own = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), name);
  if (!own) PyErr_Clear();
  Py_XDECREF(own);
  return own == dispatch_;
}

const Torch::Type* Torch::type_of(std::int32_t dtype) const {
  if (!(dtype & kDlpackDtype)) {
    return dtype >= 0 && dtype < kNumbers && types_[dtype] ? &*types_[dtype] : nullptr;
  }
  static constexpr Type types[] = {{DType::bf16, false}, {DType::f16, false}, {DType::f32, false}, {DType::f64, false},
                                   {DType::f16, true},   {DType::f32, true},  {DType::f64, true}};
  static constexpr Type bytes = {DType::u8, false};
  const int code = dtype >> 8 & 0xff, bits = dtype & 0xff;
  if (code == kDLUInt) return bits == 8 ? &bytes : nullptr;
  if (code == kDLBfloat) return bits == 16 ? &types[0] : nullptr;
  if (code != kDLFloat && code != kDLComplex) return nullptr;
  const int part = code == kDLComplex ? bits / 2 : bits;
  const int size = part == 16 ? 0 : part == 32 ? 1 : part == 64 ? 2 : -1;
  return size < 0 ? nullptr : &types[(code == kDLComplex ? 4 : 1) + size];
}

std::optional<DType> Torch::element_type(std::int32_t dtype) const {
  const Type* type = type_of(dtype);
  return type ? std::optional(type->parts) : std::nullopt;
}

bool Torch::is_complex(std::int32_t dtype) const {
  const Type* type = type_of(dtype);
  return type && type->complex;
}

int Torch::item_size(std::int32_t dtype) const {
  const Type* type = type_of(dtype);
  return type ? kDTypeSizes[static_cast<int>(type->parts)] * (type->complex ? 2 : 1) : 1;
}

}  // namespace fusedopt::host
