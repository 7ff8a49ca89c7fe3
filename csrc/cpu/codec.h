// Elements as they are stored, to values of the compute type and back.
#pragma once

#include "cpu/job.h"

namespace fusedopt::cpu {

constexpr std::int64_t kTile = 1024;  // elements of a tile that passes through buffers: six of 4 KiB stay in L1

// An operand of a row.
struct Stored {
  const Row& row;
  int operand;

  Codec codec() const { return row.codecs[operand]; }
  void* address() const { return row.addresses[operand]; }
  void* partner() const { return row.partners[operand]; }
  // Null where it is dense.
  const Layout* layout() const { return row.layouts ? row.layouts[operand] : nullptr; }
  const Layout* partner_layout() const { return row.layouts ? row.layouts[row.n_operands + operand] : nullptr; }
};

// Elements [begin, begin + count) of an operand, in its row's order. What has blocks has whole ones there; what is not
// dense, or has a partner, has kTile elements at most.
template <class T>
void decode(T* values, const Stored& from, std::int64_t begin, std::int64_t count);

// step: of the words that round them, where the codec draws.
template <class T>
void encode(const T* values, const Stored& to, std::int64_t begin, std::int64_t count, std::uint32_t step);

// Memory for values, of this thread's, until it asks again.
void* scratch(std::size_t bytes);

}  // namespace fusedopt::cpu
