#include "host/written_memory.h"

#include <algorithm>
#include <utility>

namespace fusedopt::host {

void WrittenMemory::add(const void* address, std::int64_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  if (bytes) spans_.push_back({begin, begin + static_cast<std::uintptr_t>(bytes)});
}

void WrittenMemory::finish() {
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

bool WrittenMemory::meets(const void* address, std::int64_t bytes) const {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  const auto next = std::upper_bound(spans_.begin(), spans_.end(), begin,
                                     [](std::uintptr_t at, const Span& span) { return at < span.end; });
  return next != spans_.end() && next->begin < begin + static_cast<std::uintptr_t>(bytes);
}

}  // namespace fusedopt::host
