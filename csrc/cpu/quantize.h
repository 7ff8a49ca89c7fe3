// Blocks of 8-bit codes, see fusedopt/codecs.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/operands.h"
#include "cpu/vectors.h"

namespace fusedopt::cpu {

// Vectors of a block's values: u |u|, where u is a multiple of the step. As the sign comes last, what follows cannot be
// contracted with the product, and a value is the same wherever it is used.
class Dequantize {
 public:
  Dequantize() = default;
  Dequantize(float scale, Codec codec)
      : step_(std::sqrt(scale) / levels(codec)), zero_(codec == Codec::q8_signed ? 128 : 0) {}
  Floats operator()(const std::uint8_t* codes) const {
    const Floats u = __builtin_convertvector(reinterpret_cast<Ints>(widen(codes)) - zero_, Floats) * step_;
    return floats(words(u * u) | (words(u) & 0x80000000u));
  }

 private:
  float step_ = 0;
  std::int32_t zero_ = 0;
};

// The values of a block's codes.
void dequantize(float* values, const std::uint8_t* codes, float scale, Codec codec, int n);

// The codes of a block's values; returns its scale.
float quantize(std::uint8_t* codes, const float* values, Codec codec, int n);

}  // namespace fusedopt::cpu
