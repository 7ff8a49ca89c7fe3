// bfloat16 and the masters behind it, see fusedopt/codecs.py. Runs of n elements, none of which overlap.
#pragma once

#include <cstdint>

namespace fusedopt::cpu {

void widen_bf16(float* to, const std::uint16_t* from, std::int64_t n);
void round_bf16(std::uint16_t* to, const float* from, std::int64_t n);  // nearest even

void join(float* to, const std::uint16_t* visible, const std::uint16_t* low, std::int64_t n);
void split(std::uint16_t* visible, std::uint16_t* low, const float* from, std::int64_t n);

// The master, but the parameter where that is not the rounded master.
void current_master(float* to, const std::uint16_t* visible, const float* master, std::int64_t n);
void round_master(std::uint16_t* to, const float* master, std::int64_t n);  // half away from zero

void round_bf16_by(std::uint16_t* to, const float* from, const std::uint32_t* words, std::int64_t n);

}  // namespace fusedopt::cpu
