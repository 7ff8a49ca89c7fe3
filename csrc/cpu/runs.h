// Runs of n elements of bfloat16, none of which overlap; see cpu/halves.h.
#pragma once

#include <cstdint>

namespace fusedopt::cpu {

void widen(float* to, const std::uint16_t* from, std::int64_t n);
void round_nearest(std::uint16_t* to, const float* from, std::int64_t n);

void join(float* to, const std::uint16_t* visible, const std::uint16_t* low, std::int64_t n);
void split(std::uint16_t* visible, std::uint16_t* low, const float* from, std::int64_t n);

void current(float* to, const std::uint16_t* visible, const float* master, std::int64_t n);
void round_away(std::uint16_t* to, const float* from, std::int64_t n);

void round_by(std::uint16_t* to, const float* from, const std::uint32_t* random, std::int64_t n);

}  // namespace fusedopt::cpu
