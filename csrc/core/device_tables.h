// The tables that engines on a device read, word by word. fusedopt/layout.py describes them; a test compares.
#pragma once

#include <cstdint>

#include "core/fields.h"

// An enumeration from 0 on, and the array of its names.
#define FUSEDOPT_WORDS(Enum, names, ...) \
  enum Enum : int { __VA_ARGS__ };       \
  constexpr auto names = FUSEDOPT_NAMES(__VA_ARGS__)

namespace fusedopt {

FUSEDOPT_WORDS(RowWord, row_words, kNumel, kSignature, kLayout, kGroup, kCounter, kDraw, kFirstElement, kSlice,
               kOperandAddresses);
FUSEDOPT_WORDS(StepWord, step_words, kMaxNorm, kMeasured, kSkipNonfinite, kGrads);
FUSEDOPT_WORDS(GroupFlag, group_flags, kDecoupled, kSign, kCautious);
FUSEDOPT_WORDS(OptionNumber, option_numbers, kDecayOrPeriod, kAlpha, kEta, kGamma, kSeed);
FUSEDOPT_WORDS(StatusNumber, status_numbers, kSquaredNorm, kNorm, kNarrowNorm);
FUSEDOPT_WORDS(StatusCount, status_counts, kDone, kSkippedSteps, kSkipped, kSharesMeasured, kSharesUpdated,
               kSharesSummed);
FUSEDOPT_WORDS(SumsWord, sums_words, kFirstSegment, kSegmentLength, kScope, kFirstShare, kLastShare);

// A group's record in the step table: pairs of lr, weight decay, the hyperparameters, and of OptionNumber where any
// group asks for options; then its flags.
constexpr int record_words(int n_hyper) { return 2 * (2 + n_hyper) + static_cast<int>(group_flags.size()); }

// Of a gradient's word: its states are new, and its average; it has no memory (the rest of the word is its address, 0
// without one).
constexpr std::int64_t kNewState = 1;
constexpr std::int64_t kNewAverage = std::int64_t{1} << 62;
constexpr std::int64_t kNoMemory = 2;

}  // namespace fusedopt
