// The step of rows whose gradient and states have few bits: from them to registers, and back by blocks. It takes a
// fifth less time than through memory, where loads wait for stores.
#pragma once

#include "cpu/codec.h"
#include "cpu/elements.h"
#include "cpu/halves.h"
#include "cpu/quantize.h"

namespace fusedopt::cpu {

enum class States { halves, codes, others };

// How a row's states are stored, if it can be stepped so: its gradient is bfloat16, its states are all alike, and both
// are dense; and it is computed in float.
States packed_states(const Row& row);

// kPair elements of a state from one on, which lies in a block of codes.
template <States S>
struct Packed;

template <>
struct Packed<States::halves> {
  Packed() = default;
  Packed(const Row& row, int operand, std::int64_t)
      : halves(static_cast<const std::uint16_t*>(row.addresses[operand])) {}
  Two<Floats> operator()(std::int64_t i) const { return value(load<Halves>(halves + i)); }

  const std::uint16_t* halves;
};

template <>
struct Packed<States::codes> {
  Packed() = default;
  Packed(const Row& row, int operand, std::int64_t begin)
      : codes(static_cast<const std::uint8_t*>(row.addresses[operand])),
        dequantize(static_cast<const float*>(row.partners[operand])[block_of(row, begin)], row.codecs[operand]) {}
  Two<Floats> operator()(std::int64_t i) const { return {dequantize(codes + i), dequantize(codes + i + kWords)}; }

  const std::uint8_t* codes;
  Dequantize dequantize;
};

// Calls body(k) for k of 0 to N - 1, each a constant.
template <int N, class Body>
[[gnu::always_inline]] inline void each(Body body) {
  [&]<int... k>(std::integer_sequence<int, k...>) {
    (body(std::integral_constant<int, k>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// The step of elements [begin, begin + kBlockElements), a whole block of codes where there are any. The parameter,
// which is late to be asked for, passes through memory.
template <class Rule, States S>
void step_block(const Row& row, std::int64_t begin, EngineScalars<float> e,
                typename Rule::template Coefficients<float> c, std::uint32_t step) {
  constexpr int n = kOperands<Rule>;
  const Packed<States::halves> gradient(row, kGrad, begin);
  Packed<S> states[n];
  alignas(kBytes) float after[n][kBlockElements];
  each<n>([&](auto k) {
    if constexpr (k >= kFirstState) states[k] = Packed<S>(row, k, begin);
  });
  decode(after[kParam], {row, kParam}, begin, kBlockElements);
  for (int i = 0; i < kBlockElements; i += kPair) {
    alignas(kBytes) float values[n][kPair];
    float* streams[n];
    each<n>([&](auto k) {
      streams[k] = k == kParam ? after[k] + i : values[k];
      if constexpr (k == kGrad) store(values[k], gradient(begin + i));
      if constexpr (k >= kFirstState) store(values[k], states[k](begin + i));
    });
    Elements<Rule, float>(streams, e, c).step(0, kPair);
    each<n>([&](auto k) {
      if constexpr (k >= kFirstState) store(after[k] + i, load_two<Floats>(values[k]));
    });
  }
  each<n>([&](auto k) {
    if constexpr (k != kGrad) encode(after[k], {row, k}, begin, kBlockElements, step);
  });
}

}  // namespace fusedopt::cpu
