// The memory that a step writes, to be asked whether a gradient lies in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedopt::host {

class WrittenMemory {
 public:
  WrittenMemory() : storages_(1) {}
  // A piece of it, and where its storage begins.
  void add(std::uintptr_t begin, std::uintptr_t end, std::uintptr_t storage);
  // Nothing is added any more.
  void finish();

  // Quickly, whether a storage may have a piece of it: almost always false where it has none.
  bool may_be_in(std::uintptr_t storage) const { return storages_[place(storage)]; }
  // Whether any piece of it lies there.
  bool meets(std::uintptr_t begin, std::uintptr_t end) const;

 private:
  struct Span {
    std::uintptr_t begin, end, storage;
  };
  std::size_t place(std::uintptr_t storage) const {
    return (storage >> 4) * 0x9e3779b97f4a7c15 >> 20 & (storages_.size() - 1);
  }

  std::vector<Span> spans_;  // when finished, sorted and disjoint
  std::vector<bool> storages_;
};

}  // namespace fusedopt::host
