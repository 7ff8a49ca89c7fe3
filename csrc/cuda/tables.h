// What a launch reads: tables in the device's memory, described in triton_kernels/walk.py, and what comes by value.
#pragma once

#include <cstdint>

#include "core/job.h"

namespace fusedopt::cuda {

// Words of a row.
constexpr int kNumel = 0;
constexpr int kKind = 1;
constexpr int kLayout = 2;
constexpr int kGroup = 3;
constexpr int kAddresses = 4;

// Words of the live table before its rows.
constexpr int kMaxNorm = 0;
constexpr int kMeasured = 1;
constexpr int kSkip = 2;
constexpr int kHeader = 3;

constexpr int kTile = 256;     // elements that a warp steps at a time, 8 for each lane
constexpr int kThreads = 128;  // of a block

// What rows may have in common: types, and which of the rule's variants they need. One register.
struct Kind {
  std::uint32_t bits;

  static constexpr int kStates = 2 * kMaxOperands, kVariant = kStates + 3, kStrided = kVariant + 3,
                       kHalves = kStrided + 1, kWide = kHalves + 1;

  FUSEDOPT_HD DType dtype(int operand) const { return static_cast<DType>(bits >> (2 * operand) & 3); }
  FUSEDOPT_HD int n_states() const { return static_cast<int>(bits >> kStates & 7); }
  FUSEDOPT_HD int variant() const { return static_cast<int>(bits >> kVariant & 7); }
  FUSEDOPT_HD bool strided() const { return bits >> kStrided & 1; }
  // Some operand is a double, so that elements are read one by one.
  FUSEDOPT_HD bool wide() const { return bits >> kWide & 1; }
  // Some operand has 2 bytes, so that a lane's 8 elements are neighbours.
  FUSEDOPT_HD bool halves() const { return bits >> kHalves & 1; }
};
constexpr int kMaxKinds = 64;

struct Tables {
  const std::int64_t* rows;
  const std::int64_t* tiles;
  const std::int64_t* shares;
  const std::int64_t* layouts;
  const std::int64_t* live;  // null when it comes by value
  double* partials;          // one for each block
  double* verdict;           // squared norm, norm
  int* counters;             // blocks that are done; steps skipped; whether this one was
  const float* grad_scale;
  const float* found_inf;
  int n_rows;
  int width;       // words of a row
  int max_states;  // addresses of states in a row
  bool measure, update;
  Kind kinds[kMaxKinds];
};

// Kernels take up to 32,764 bytes of arguments from compute capability 7.0 and CUDA 12.1 on; small ones launch faster.
constexpr int kSmall = 256;
constexpr int kLarge = (32764 - sizeof(Tables)) / 8 / 8 * 8;

template <int Words>
struct Arguments {
  Tables tables;
  std::int64_t live[Words];
};

}  // namespace fusedopt::cuda
