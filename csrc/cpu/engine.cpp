#include "cpu/engine.h"

#include <cmath>
#include <limits>

#include "cpu/codec.h"

namespace fusedopt::cpu {
namespace {

constexpr std::int64_t kStage = 1024;  // elements staged at a time: six operands of 4 KiB stay in L1
constexpr int kLanes = 16;

// Sum of squares in double: exact products of float inputs, added in a fixed order of lanes.
template <class T>
double sum_squares(const T* x, std::int64_t n) {
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const double value = x[i + k];
      lanes[k] += value * value;
    }
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += static_cast<double>(x[i]) * x[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

template <class T>
constexpr DType compute_type = std::is_same_v<T, float> ? DType::f32 : DType::f64;

struct RowView {
  const Row& row;

  const Layout* layout(int operand) const { return row.layouts ? row.layouts->operand[operand] : nullptr; }
  template <class T>
  T* direct(int operand) const {
    const bool plain = row.dtype[operand] == compute_type<T> && !layout(operand);
    return plain ? static_cast<T*>(row.data[operand]) : nullptr;
  }
  template <class T>
  void load(T* buffer, int operand, std::int64_t begin, std::int64_t count) const {
    cpu::load(buffer, row.data[operand], row.dtype[operand], layout(operand), begin, count);
  }
  template <class T>
  void store(const T* buffer, int operand, std::int64_t begin, std::int64_t count) const {
    cpu::store(buffer, row.data[operand], row.dtype[operand], layout(operand), begin, count);
  }
};

double measure(const Row& row, const Item& item) {
  const RowView view{row};
  if (const float* g = view.direct<float>(kGrad)) return sum_squares(g + item.begin, item.count);
  if (const double* g = view.direct<double>(kGrad)) return sum_squares(g + item.begin, item.count);
  double total = 0;
  double buffer[kStage];
  for (std::int64_t at = 0; at < item.count; at += kStage) {
    const std::int64_t n = item.count - at < kStage ? item.count - at : kStage;
    view.load(buffer, kGrad, item.begin + at, n);
    total += sum_squares(buffer, n);
  }
  return total;
}

inline void step_tile(const Kernel& kernel, std::int64_t n, float* p, const float* g, float* const* s,
                      const Common<float>& common, const double* c) {
  kernel.tile_f32(n, p, g, s, common, c);
}
inline void step_tile(const Kernel& kernel, std::int64_t n, double* p, const double* g, double* const* s,
                      const Common<double>& common, const double* c) {
  kernel.tile_f64(n, p, g, s, common, c);
}

// An operand that is not dense or not of the compute type passes through a buffer, a stage at a time.
template <class T>
void step_staged(const Row& row, const Item& item, const Common<T>& common, const double* coefficients) {
  const RowView view{row};
  const int operands = kFirstState + row.kernel->n_states;
  T buffers[kMaxOperands][kStage];
  T* direct[kMaxOperands];
  for (int k = 0; k < operands; ++k) direct[k] = view.direct<T>(k);
  for (std::int64_t at = 0; at < item.count; at += kStage) {
    const std::int64_t n = item.count - at < kStage ? item.count - at : kStage;
    const std::int64_t begin = item.begin + at;
    T* tile[kMaxOperands] = {};
    for (int k = 0; k < operands; ++k) {
      tile[k] = direct[k] ? direct[k] + begin : buffers[k];
      if (!direct[k]) view.load(buffers[k], k, begin, n);
    }
    step_tile(*row.kernel, n, tile[kParam], tile[kGrad], tile + kFirstState, common, coefficients);
    for (int k = 0; k < operands; ++k) {
      if (!direct[k] && k != kGrad) view.store(buffers[k], k, begin, n);
    }
  }
}

template <class T>
void step_item(const Row& row, const Item& item, const Cohort& cohort, double factor) {
  const Common<T> common{static_cast<T>(cohort.sign * factor), static_cast<T>(cohort.coupled_decay),
                         static_cast<T>(cohort.keep), static_cast<T>(cohort.lr)};
  if (!row.in_place) return step_staged<T>(row, item, common, cohort.coefficients);
  T* states[kMaxStates];
  for (int k = 0; k < row.kernel->n_states; ++k) {
    states[k] = static_cast<T*>(row.data[kFirstState + k]) + item.begin;
  }
  step_tile(*row.kernel, item.count, static_cast<T*>(row.data[kParam]) + item.begin,
            static_cast<const T*>(row.data[kGrad]) + item.begin, states, common, cohort.coefficients);
}

// torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), and NaN stays NaN.
double clip_coefficient(double norm, double max_norm) {
  if (max_norm == std::numeric_limits<double>::infinity()) return 1;
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

double total(const double* partials, std::int64_t n) {
  double sum = 0;
  for (std::int64_t b = 0; b < n; ++b) sum += partials[b];
  return sum;
}

}  // namespace

void run(Job& job) {
  double factor = job.inverse_scale;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
  {
    if (job.measure) {
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t b = 0; b < job.n_bundles; ++b) {
        double partial = 0;
        for (std::int64_t i = job.bundles[b]; i < job.bundles[b + 1]; ++i) {
          const Row& row = job.rows[job.items[i].row];
          if (row.active) partial += measure(row, job.items[i]);
        }
        job.partials[b] = partial;
      }
    }
#pragma omp single
    {
      if (job.measure) job.squared_norm = total(job.partials, job.n_bundles);
      const double norm = std::sqrt(job.squared_norm) * job.inverse_scale;
      job.skipped = job.skip_nonfinite && !std::isfinite(norm);
      factor *= clip_coefficient(norm, job.max_norm);
    }
    if (job.update && !job.skipped) {
      // Backwards, so that the gradients that the norm touched last are still in cache.
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t b = job.n_bundles - 1; b >= 0; --b) {
        for (std::int64_t i = job.bundles[b]; i < job.bundles[b + 1]; ++i) {
          const Row& row = job.rows[job.items[i].row];
          if (!row.active) continue;
          const Cohort& cohort = job.cohorts[row.cohort];
          if (row.dtype[kParam] == DType::f64) {
            step_item<double>(row, job.items[i], cohort, factor);
          } else {
            step_item<float>(row, job.items[i], cohort, factor);
          }
        }
      }
    }
  }
}

void stream(float* const* updated, int updates, const float* const* read, int reads, std::int64_t n, int threads) {
  // Longer runs than the engine's tiles, and one simple loop for each pair of streams: the fastest of
  // the triads that were tried (fused loops, prefetch, non-temporal stores) or within 2% of it.
  const std::int64_t share = n / (threads * 32) / kStage * kStage;
  const std::int64_t tile = share > 65536 ? share : 65536;
  const int passes = updates > reads ? updates : reads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const std::int64_t end = begin + tile < n ? begin + tile : n;
    for (std::int64_t at = begin; at < end; at += kStage) {
      const std::int64_t stop = at + kStage < end ? at + kStage : end;
      for (int k = 0; k < passes; ++k) {
        float* const u = updated[k % updates];
        const float* const r = read[k % reads];
        for (std::int64_t i = at; i < stop; ++i) u[i] = u[i] * 0.5f + r[i];
      }
    }
  }
}

}  // namespace fusedopt::cpu
