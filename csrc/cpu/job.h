// What the host hands to the CPU engine: plain tables, no Python, no torch.
#pragma once

#include <cstdint>

#include "core/operands.h"
#include "core/step.h"

namespace fusedopt {

constexpr int kMaxDims = 64;  // as many as torch has

// Strides of an operand in the order in which its row is walked (outermost first), in elements.
struct Layout {
  int ndim = 0;
  std::int64_t shape[kMaxDims];
  std::int64_t stride[kMaxDims];
};

struct Cohort;
struct Segment;

struct Kernel {
  RuleNames names;
  void (*prepare)(const double* hyper, double* scalars, bool new_state, double* coefficients);
  void (*update)(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients);
};

// Rows whose steps advance together under the same hyperparameters.
struct Cohort {
  double lr, weight_decay, sign;
  bool is_decoupled;
  std::size_t coefficients;  // where they begin in Job::coefficients
};

struct Row {
  std::int64_t numel;
  const Kernel* kernel;
  void** addresses;              // of each operand, in the order of their roles; second ones behind all first ones
  const Codec* codecs;           // of each operand: the row's signature, which rows share
  const Layout* const* layouts;  // of each operand, null where it is dense; null when all are
  std::int32_t cohort;
  bool active;  // has a gradient in this step
};

// The elements of a row that are in one share.
struct Segment {
  const Row& row;
  std::int64_t begin, end;
};

// Where a share begins; it ends where the next one does.
struct Share {
  std::int32_t row;
  std::int64_t begin;
};

struct Job {
  const Row* rows;
  const Share* shares;  // n_shares + 1
  std::int64_t n_shares;
  const Cohort* cohorts;
  const double* coefficients;
  double* partials;  // n_shares, sums of the gradients' squares

  int threads;
  bool measure;  // sum the squares
  bool update;   // step, unless it is skipped
  bool skip_nonfinite;
  double inverse_scale;  // 1 / loss scale
  double max_norm;       // clip to it; infinity: don't
  double squared_norm;   // an input where it is not measured
  bool skipped;          // out
};

}  // namespace fusedopt
