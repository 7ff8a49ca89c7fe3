// Elements as they are stored, to values of the compute type and back.
#pragma once

#include "cpu/job.h"

namespace fusedopt::cpu {

// Elements [begin, begin + count) of an operand, in its row's order. A null layout means dense.
template <class T>
void decode(T* values, const Operand& operand, const Layout* layout, std::int64_t begin, std::int64_t count);

template <class T>
void encode(const T* values, const Operand& operand, const Layout* layout, std::int64_t begin, std::int64_t count);

}  // namespace fusedopt::cpu
