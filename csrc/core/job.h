// What the host side hands to an engine: plain tables, no Python, no torch.
#pragma once

#include <cstdint>

#include "core/rule.h"
#include "core/step.h"

namespace fusedopt {

enum class DType : std::uint8_t { f32, f64, bf16, f16 };

// Operands of a row: parameter, gradient, then the rule's states.
constexpr int kParam = 0;
constexpr int kGrad = 1;
constexpr int kFirstState = 2;
constexpr int kMaxOperands = kFirstState + kMaxStates;
constexpr int kMaxDims = 64;  // as many as torch has

// Strides of an operand in the order in which its row is walked (outermost first), in elements.
struct Layout {
  int ndim = 0;
  std::int64_t shape[kMaxDims];
  std::int64_t stride[kMaxDims];
};

// Where an operand is not dense in the row's order, its layout; null where it is.
struct Layouts {
  const Layout* operand[kMaxOperands] = {};
};

struct Kernel {
  const char* rule;
  int n_states, n_scalars, n_hyper;
  const char* const* states;
  const char* const* scalars;
  const char* const* hyper;
  void (*prepare)(const double* hyper, double* scalars, bool first, double* coefficients);
  void (*tile_f32)(std::int64_t n, float* p, const float* g, float* const* states, const Common<float>& common,
                   const double* coefficients);
  void (*tile_f64)(std::int64_t n, double* p, const double* g, double* const* states, const Common<double>& common,
                   const double* coefficients);
};

// Tensors whose steps advance together under the same hyperparameters.
struct Cohort {
  double lr, coupled_decay, keep, sign;
  double coefficients[kMaxCoefficients];
};

struct Row {
  std::int64_t numel;
  const Kernel* kernel;
  void* data[kMaxOperands];
  const Layouts* layouts;  // null when every operand is dense
  std::int32_t cohort;
  DType dtype[kMaxOperands];
  bool active;    // has a gradient in this step
  bool in_place;  // every operand is dense and of the compute type: no staging
};

// A piece of one row. Bundles of items are the unit of scheduling.
struct Item {
  std::int32_t row;
  std::int32_t count;
  std::int64_t begin;
};

struct Job {
  const Row* rows;
  const Item* items;
  const std::int64_t* bundles;  // n_bundles + 1 offsets into items
  std::int64_t n_bundles;
  const Cohort* cohorts;
  double* partials;  // n_bundles, squares of the gradients

  int threads;
  bool measure;  // compute squared_norm
  bool update;   // step, unless skipped
  bool skip_nonfinite;
  double inverse_scale;  // 1 / loss scale
  double max_norm;       // clip to it; infinity: don't
  double squared_norm;   // of the scaled gradients; an input when !measure and finite max_norm
  bool skipped;          // out
};

}  // namespace fusedopt
