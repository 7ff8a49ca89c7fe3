#include "cpu/stream.h"

namespace fusedopt::cpu {
namespace {

constexpr std::int64_t kRun = 1024;
constexpr std::int64_t kSmallestTile = 65536;

}  // namespace

void stream(float* const* updated, int updates, const float* const* read, int reads, std::int64_t n, int threads) {
  // Longer tiles than the engine's, and one simple loop for each pair of streams: the fastest of
  // the triads that were tried (fused loops, prefetch, non-temporal stores) or within 2% of it.
  const std::int64_t share = n / (threads * 32) / kRun * kRun;
  const std::int64_t tile = share > kSmallestTile ? share : kSmallestTile;
  const int passes = updates > reads ? updates : reads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const std::int64_t end = begin + tile < n ? begin + tile : n;
    for (std::int64_t at = begin; at < end; at += kRun) {
      const std::int64_t stop = at + kRun < end ? at + kRun : end;
      for (int k = 0; k < passes; ++k) {
        float* const u = updated[k % updates];
        const float* const r = read[k % reads];
        for (std::int64_t i = at; i < stop; ++i) u[i] = u[i] * 0.5f + r[i];
      }
    }
  }
}

}  // namespace fusedopt::cpu
