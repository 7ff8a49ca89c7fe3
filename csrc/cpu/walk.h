// How threads find their way: the rows of a share.
#pragma once

#include "cpu/job.h"

namespace fusedopt::cpu {

inline void prefetch(const Row& row) {
  const std::size_t n = row.active ? kFirstState + row.kernel->names.states.size() : 0;
  for (std::size_t k = 0; k < n; ++k) __builtin_prefetch(row.addresses[k]);
}

// Calls body(segment, row number) for every active row of a share.
template <class Body>
inline void each_segment(const Job& job, std::int64_t share, Body body) {
  const Share first = job.shares[share], last = job.shares[share + 1];
  for (std::int32_t r = first.row; r <= last.row; ++r) {
    const Row& row = job.rows[r];
    if (r < last.row) prefetch(job.rows[r + 1]);  // 30% less time for tensors of 64 elements; farther ahead, 10%
    const std::int64_t end = r == last.row ? last.begin : row.numel;
    const Segment segment{row, r == first.row ? first.begin : 0, end, end};
    if (row.active && segment.begin < segment.end) body(segment, r);
  }
}

}  // namespace fusedopt::cpu
