#include "host/anatomy.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>

namespace fusedopt::host {

Anatomy anatomy;

namespace {

// Bytes that are safe to read: a TensorImpl and a StorageImpl are at least this large.
constexpr std::ptrdiff_t kImplBytes = 176;
constexpr std::ptrdiff_t kStorageBytes = 64;

// The offsets in [begin, end) at which `matches` holds, as a set of words.
template <class Matches>
std::uint64_t find(std::ptrdiff_t begin, std::ptrdiff_t end, Matches matches) {
  std::uint64_t found = 0;
  for (std::ptrdiff_t at = begin; at < end; at += 8) {
    if (matches(at)) found |= std::uint64_t{1} << (at / 8);
  }
  return found;
}

template <class Value>
bool holds(std::uintptr_t base, std::ptrdiff_t at, Value value) {
  return std::memcmp(reinterpret_cast<const char*>(base) + at, &value, 8) == 0;
}

bool holds_dims(std::uintptr_t impl, std::ptrdiff_t at, const Specimen& s) {
  const auto ndim = static_cast<std::ptrdiff_t>(s.shape.size());
  if (!holds(impl, at, static_cast<std::uint64_t>(ndim))) return false;
  for (std::ptrdiff_t d = 0; d < ndim; ++d) {
    if (!holds(impl, at + 8 * (1 + d), s.shape[d])) return false;
    if (!holds(impl, at + 8 * (1 + Anatomy::kInlineDims + d), s.stride[d])) return false;
  }
  return true;
}

// The 2-byte offsets whose values tell dtypes apart and nothing else: equal where the dtype is, and only there.
std::vector<std::ptrdiff_t> find_dtype(const std::vector<Specimen>& specimens) {
  const auto value = [](const Specimen& s, std::ptrdiff_t at) {
    std::uint16_t v;
    std::memcpy(&v, reinterpret_cast<const char*>(s.impl) + at, 2);
    return v;
  };
  std::vector<std::ptrdiff_t> found;
  for (std::ptrdiff_t at = 0; at < kImplBytes; at += 2) {
    bool fits = true;
    for (const Specimen& a : specimens) {
      for (const Specimen& b : specimens) fits &= (value(a, at) == value(b, at)) == (a.dtype == b.dtype);
    }
    if (fits) found.push_back(at);
  }
  return found;
}

}  // namespace

void Anatomy::learn(const std::vector<Specimen>& specimens) {
  constexpr int facts = 6;
  std::uint64_t sets[facts];
  std::fill(std::begin(sets), std::end(sets), ~std::uint64_t{0});
  for (const Specimen& s : specimens) {
    const auto object = reinterpret_cast<std::uintptr_t>(s.tensor);
    const std::ptrdiff_t object_end = Py_TYPE(s.tensor)->tp_basicsize - 7;
    const std::ptrdiff_t dims_end = kImplBytes - 8 * 2 * kInlineDims;
    sets[0] &= find(sizeof(PyObject), object_end, [&](auto at) { return holds(object, at, s.impl); });
    sets[1] &= find(0, kImplBytes, [&](auto at) { return holds(s.impl, at, s.storage); });
    sets[2] &= find(0, kStorageBytes, [&](auto at) { return holds(s.storage, at, s.data); });
    sets[3] &= find(0, kImplBytes, [&](auto at) { return holds(s.impl, at, s.offset); });
    sets[4] &= find(0, dims_end, [&](auto at) { return holds_dims(s.impl, at, s); });
    sets[5] &= find(0, kImplBytes, [&](auto at) { return holds(s.impl, at, s.keys); });
  }
  const std::vector<std::ptrdiff_t> dtypes = find_dtype(specimens);
  known_ = dtypes.size() == 1;
  for (const std::uint64_t set : sets) known_ = known_ && std::has_single_bit(set);
  if (!known_) return;
  impl_ = 8 * std::countr_zero(sets[0]);
  storage_ = 8 * std::countr_zero(sets[1]);
  data_ = 8 * std::countr_zero(sets[2]);
  offset_ = 8 * std::countr_zero(sets[3]);
  dims_ = 8 * std::countr_zero(sets[4]);
  keys_ = 8 * std::countr_zero(sets[5]);
  dtype_ = dtypes[0];
}

}  // namespace fusedopt::host
