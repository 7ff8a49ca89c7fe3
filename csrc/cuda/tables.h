// What a launch reads: tables in the device's memory, described in fusedopt/layout.py, and what comes by value.
#pragma once

#include "core/device_tables.h"
#include "core/operands.h"
#include "core/step.h"
#include "cuda/policy.h"

namespace fusedopt::cuda {

constexpr int kTile = 256;  // elements that a warp steps at a time, 8 for each lane; a block of codes
static_assert(kTile == kBlockElements);
constexpr int kWarps = kThreads / 32;

// A rule beside which groups ask for options: kernels of their own, for the others would have fewer registers.
template <class Rule>
struct Optioned : Rule {
  static constexpr bool has_options = true;
};
template <class Rule>
constexpr bool kHasOptions = requires { Rule::has_options; };

// A signature is a word of flags, then words of codecs, four bits each.
constexpr int kCodecBits = 4;
constexpr int kCodecsInWord = 8;
constexpr int codec_words(int n_operands) { return (n_operands + kCodecsInWord - 1) / kCodecsInWord; }

enum SignatureFlag : std::uint32_t {
  kStrided = 1,  // some operand is not dense in the parameter's order
  kWide = 2,     // some operand is a double, so that tiles are never whole
  kHalves = 4,   // some operand has 2 bytes, so that a lane's elements of a whole tile are neighbours
  kBlocks = 8,   // some codec has blocks, so that no head is peeled
  kEma = 16,     // the last operand is an average of this kind
  kSlow = 32,
  kHasAverage = kEma | kSlow,
  kDraws = 64,      // the gradient gets noise
  kPadded = 128,    // slices have empty places behind them, see fusedopt/layout.py
  kPartner = 256,   // what stands beside the parameter has its shape
  kIndexed = 512,   // something is drawn, so that strided rows have a logical index
  kVariant = 1024,  // times the variant of the rule
};

// The codec of an operand, by a signature's words of codecs.
FUSEDOPT_HD Codec codec_in(const std::uint32_t* words, int operand) {
  const std::uint32_t word = words[operand / kCodecsInWord] >> (kCodecBits * (operand % kCodecsInWord));
  return static_cast<Codec>(word & ((1u << kCodecBits) - 1));
}

// Of a row with up to N operands.
template <int N>
struct Signature {
  std::uint32_t flags;
  std::uint32_t codecs[codec_words(N)];

  FUSEDOPT_HD bool has(SignatureFlag flag) const { return flags & flag; }
  FUSEDOPT_HD Codec codec(int operand) const { return codec_in(codecs, operand); }
};

// Shares are cut in runs, one for each warp, where more is added up than the gradients' squares.
constexpr int kRunsPerShare = kWarps;

// Whether a launch goes on from one pass to the next over the whole grid, so that it must be cooperative.
FUSEDOPT_HD bool goes_on(int passes) { return (passes & kUpdatePass) && (passes & (kUpdatePass - 1)); }

// Of rules that add up, see fusedopt/sums.py for the last four.
struct SumTables {
  const std::int64_t* row_sums;
  double* slots;           // n_shares * kRunsPerShare + n_segments, of the rule's measures
  double* epilogue_slots;  // the same for rows, of the rule's epilogue; behind them a row's own sums
  double* segments;
  double* wholes;
  double* largest;
  double* epilogue;
  int n_segments;
  int n_scopes;
  int shared;  // a bit for each scalar
  bool has_scopes;
  bool in_channels;
};

struct Tables {
  const std::int64_t* rows;
  const std::int64_t* tiles;
  const std::int64_t* shares;
  const std::int64_t* borders;
  const std::int64_t* layouts;
  const std::uint32_t* signatures;  // n_states decides how many words each has
  const std::int64_t* step_table;   // null when it comes by value
  double* partials;
  double* numbers;
  int* counts;
  const float* grad_scale;
  const float* found_inf;
  int n_rows;
  int n_shares;
  int n_borders;
  int width;      // words of a row
  int n_states;   // of a row, at most, its average among them
  int passes;     // bits of Pass
  int n_options;  // numbers behind the hyperparameters in a group's record
  SumTables sums;

  FUSEDOPT_HD bool asks(Pass pass) const { return (passes & pass) != 0; }
};

// Kernels take up to 32,764 bytes of arguments from compute capability 7.0 and CUDA 12.1 on; small ones launch faster.
constexpr int kSmall = 256;
constexpr int kLarge = (32764 - sizeof(Tables)) / 8 / 8 * 8;

template <int Words>
struct Arguments {
  Tables tables;
  std::int64_t step_table[Words];
};

}  // namespace fusedopt::cuda
