#include "cpu/packed.h"

namespace fusedopt::cpu {

States packed_states(const Row& row) {
  const auto is = [&](int k, States states) {
    const bool fits = states == States::codes ? has_blocks(row.codecs[k]) : row.codecs[k] == Codec::bf16;
    return fits && !(row.layouts && row.layouts[k]);
  };
  const bool is_wide = row.codecs[kParam] == Codec::f64;
  if (is_wide || !is(kGrad, States::halves) || (row.slice > 0 && row.slice < kBlockElements)) return States::others;
  for (const States states : {States::halves, States::codes}) {
    int n = kFirstState;
    while (n < row.n_operands && is(n, states)) ++n;
    if (n > kFirstState && n == row.n_operands) return states;
  }
  return States::others;
}

}  // namespace fusedopt::cpu
