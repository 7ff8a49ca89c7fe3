#include "host/device_table.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <stdexcept>
#include <string>

#include "core/device_tables.h"

namespace fusedopt::host {
namespace {

// A one-element float32 or float64 tensor on the roster's device is read there, so that nothing waits for it.
std::int64_t source_of(PyObject* value, const void* context) {
  const Geometry& device = static_cast<const Roster*>(context)->device();
  if (PyFloat_CheckExact(value) || !torch.is_plain(value)) return 0;
  Geometry t;
  if (!torch.read(value, Access::kRead, &t) || t.device_type != device.device_type ||
      t.device_index != device.device_index || t.numel() != 1 || t.conjugated || t.negated) {
    return 0;
  }
  const std::optional<DType> dtype = torch.element_type(t.dtype);
  if (!dtype || torch.is_complex(t.dtype) || !t.has_memory(torch.item_size(t.dtype))) return 0;
  if (*dtype != DType::f32 && *dtype != DType::f64) return 0;
  return reinterpret_cast<std::int64_t>(t.address) | (*dtype == DType::f64);
}

}  // namespace

DeviceTable::DeviceTable(py::object param_groups, const py::list& groups, py::object state,
                         const std::vector<std::size_t>& members, const std::vector<std::size_t>& new_state,
                         const std::vector<std::size_t>& new_average)
    : roster_(std::move(param_groups), groups, std::move(state), members, new_state, new_average) {}

bool DeviceTable::scan(int threads) {
  if (!roster_.scan(threads, source_of, &roster_)) return false;
  for (std::size_t i = 0; i < roster_.size(); ++i) {
    if (!roster_.gradient_strides(i) || has_planned_strides(i)) continue;
    release();
    return false;
  }
  return true;
}

// Whether a gradient's strides are the planned ones where they matter.
bool DeviceTable::has_planned_strides(std::size_t i) const {
  const Entry& entry = roster_.entry(i);
  const std::int64_t* const shape = roster_.dims(entry.param.dims);
  const std::int64_t* const planned = roster_.dims(entry.gradient_strides);
  const std::int64_t* const strides = roster_.gradient_strides(i);
  if (!entry.numel) return true;
  for (int d = 0; d < entry.ndim; ++d) {
    if (shape[d] != 1 && strides[d] != planned[d]) return false;
  }
  return true;
}

bool DeviceTable::write(const py::handle& words) const {
  std::size_t wanted = roster_.size();
  for (std::size_t g = 0; g < roster_.groups(); ++g) {
    wanted += static_cast<std::size_t>(record_words(static_cast<int>(roster_.group(g).values.size()) - 2));
  }
  Geometry table;
  const bool fits = torch.is_tensor(words.ptr()) && torch.read(words.ptr(), Access::kWrite, &table) &&
                    table.ndim == 1 && table.shape[0] == static_cast<std::int64_t>(wanted) && table.strides[0] == 1 &&
                    table.has_memory(sizeof(std::int64_t)) && words.attr("is_cpu").cast<bool>() &&
                    words.attr("itemsize").cast<std::size_t>() == sizeof(std::int64_t);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!fits) {
    throw std::invalid_argument("the table must be a CPU int64 tensor of " + std::to_string(wanted) + " elements");
  }
  auto* out = static_cast<std::int64_t*>(table.address);
  std::int64_t changed = 0;
  const auto put = [&](std::int64_t word) {
    changed |= *out ^ word;
    *out++ = word;
  };
  for (std::size_t i = 0; i < roster_.size(); ++i) {
    const Entry& entry = roster_.entry(i);
    const auto address = reinterpret_cast<std::int64_t>(roster_.gradient_address(i));
    const std::int64_t flags = kNewState * roster_.has_new_state(i) + kNewAverage * roster_.has_new_average(i);
    put(roster_.has_gradient(i) ? (entry.numel ? address : kNoMemory) + flags : 0);
  }
  for (std::size_t g = 0; g < roster_.groups(); ++g) {
    const Group& group = roster_.group(g);
    for (std::size_t k = 0; k < group.values.size(); ++k) {
      put(std::bit_cast<std::int64_t>(group.values[k]));
      put(group.sources[k]);
    }
    const std::int64_t flags[] = {group.is_decoupled, static_cast<std::int64_t>(group.sign),
                                  group.is_cautious};  // as GroupFlag
    std::for_each(std::begin(flags), std::end(flags), put);
  }
  return changed != 0;
}

void DeviceTable::commit() {
  for (std::size_t i = 0; i < roster_.size(); ++i) {
    if (roster_.has_gradient(i)) roster_.set_stepped(i);
  }
}

}  // namespace fusedopt::host
