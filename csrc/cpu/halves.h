// bfloat16 and the masters behind it, see fusedopt/codecs.py; kPair elements at a time, in registers.
#pragma once

#include "cpu/vectors.h"

namespace fusedopt::cpu {

// Halves of rounded words. NaN, whose bits may carry into another number, is made quiet instead: apart, as it is rare.
template <class Round>
[[gnu::always_inline]] inline Halves rounded_with_nan(const Two<Floats>& x, Round round) {
  const auto each = [&](Floats v) { return v == v ? round(words(v)) : words(v) | 0x400000u; };
  return upper_halves({each(x.a), each(x.b)});
}

// To the nearest, even where two are.
inline Halves nearest(const Two<Floats>& x) {
  if (has_nan(x)) [[unlikely]]
    return rounded_with_nan(x, [](Words w) { return w + 0x7fffu + ((w >> 16) & 1u); });
  const Two<Words> bits{words(x.a), words(x.b)};
  const Halves upper = upper_halves(bits), lower = lower_halves(bits);
  return upper - (lower > 0x8000 - (upper & 1));
}

// To the nearest, away from zero where two are.
inline Words away(Words w) { return w + 0x8000u; }
inline Halves away(const Two<Floats>& x) {
  if (has_nan(x)) [[unlikely]]
    return rounded_with_nan(x, [](Words w) { return away(w); });
  const Two<Words> bits{words(x.a), words(x.b)};
  return upper_halves(bits) + (lower_halves(bits) >> 15);
}

// Down or up by random words.
inline Halves rounded_by(const Two<Floats>& x, const Two<Words>& random) {
  const auto each = [](Floats v, Words w) { return v == v ? words(v) + (w >> 16) : words(v) | 0x400000u; };
  return upper_halves({each(x.a, random.a), each(x.b, random.b)});
}

inline Two<Floats> value(Halves x) {
  const Two<Words> bits = widen(x);
  return {floats(bits.a), floats(bits.b)};
}

// A zero or infinity that is none of the master's would make NaN of what is missing to another.
inline Two<Floats> join(Halves visible, Halves low) {
  const Two<Words> bits = interleave(visible - (low >> 15), low);
  const Two<Floats> all{floats(bits.a), floats(bits.b)};
  if (!has_nan(all)) [[likely]]
    return all;
  const Two<Floats> own = value(visible);
  return {all.a == all.a ? all.a : own.a, all.b == all.b ? all.b : own.b};
}

// What is missing to the parameter, which is rounded away.
inline Halves missing(const Two<Floats>& x) {
  const Halves low = lower_halves({words(x.a), words(x.b)});
  if (!has_nan(x)) [[likely]]
    return low;
  return lower_halves({x.a == x.a ? words(x.a) : Words{}, x.b == x.b ? words(x.b) : Words{}});
}

// The master, but the parameter where that is not the rounded master.
inline Two<Floats> current(Halves visible, const Two<Floats>& master) {
  const Two<Floats> own = value(visible);
  const auto each = [](Floats x, Floats y) {
    return ((x == x ? away(words(x)) : words(x) | 0x400000u) ^ words(y)) >> 16 == 0 ? x : y;
  };
  return {each(master.a, own.a), each(master.b, own.b)};
}

}  // namespace fusedopt::cpu
