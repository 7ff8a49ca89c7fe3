// The passes of rules that add up: what a share measures, what comes of that, and a step that knows it.
#pragma once

#include "cpu/walk.h"

namespace fusedopt::cpu {

// Puts what a share measures into its slots.
void measure(const Job& job, std::int64_t share, double factor);

// Steps a segment, by what was measured, and puts what the rule concludes into its slot.
void update_with_sums(const Job& job, const Segment& segment, std::int64_t row, std::int64_t share, double factor);

// Add slots up, in their order: all threads of a team call them, and none returns before all are done.
void add_segments(const Job& job);
void add_scopes(const Job& job);
void add_epilogue(const Job& job);

}  // namespace fusedopt::cpu
