#include "host/written_memory.h"

#include <algorithm>
#include <bit>

namespace fusedopt::host {
namespace {

constexpr std::size_t kBitsForEach = 16;  // with which one storage in 16 seems to have a piece that has none

}  // namespace

void WrittenMemory::add(std::uintptr_t begin, std::uintptr_t end, std::uintptr_t storage) {
  if (begin < end) spans_.push_back({begin, end, storage});
}

void WrittenMemory::finish() {
  storages_.assign(std::bit_ceil(spans_.size() * kBitsForEach + 1), false);
  for (const Span& span : spans_) storages_[place(span.storage)] = true;
  std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::vector<Span> disjoint;
  for (const Span& span : spans_) {
    if (!disjoint.empty() && span.begin <= disjoint.back().end) {
      disjoint.back().end = std::max(disjoint.back().end, span.end);
    } else {
      disjoint.push_back(span);
    }
  }
  spans_ = std::move(disjoint);
}

bool WrittenMemory::meets(std::uintptr_t begin, std::uintptr_t end) const {
  const auto next = std::upper_bound(spans_.begin(), spans_.end(), begin,
                                     [](std::uintptr_t address, const Span& span) { return address < span.end; });
  return next != spans_.end() && next->begin < end;
}

}  // namespace fusedopt::host
