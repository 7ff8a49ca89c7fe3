// The memory that a step writes, to be asked whether a gradient lies in it.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedopt::host {

class WrittenMemory {
 public:
  void add(const void* address, std::int64_t bytes);
  // Nothing is added any more.
  void finish();

  // Whether any of it lies there.
  bool meets(const void* address, std::int64_t bytes) const;

 private:
  struct Span {
    std::uintptr_t begin, end;
  };
  std::vector<Span> spans_;  // when finished, sorted and disjoint
};

}  // namespace fusedopt::host
