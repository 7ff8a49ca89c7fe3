// Blocks of 8-bit codes, see fusedopt/codecs.py.
#pragma once

#include <cstdint>

#include "core/operands.h"

namespace fusedopt::cpu {

// The values of a block's codes.
void dequantize(float* values, const std::uint8_t* codes, float scale, Codec codec, int n);

// The codes of a block's values; returns its scale.
float quantize(std::uint8_t* codes, const float* values, Codec codec, int n);

}  // namespace fusedopt::cpu
