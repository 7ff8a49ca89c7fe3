#include "cpu/stream.h"

#include <cstring>

namespace fusedopt::cpu {
namespace {

// One simple loop for each stream, in turn: the fastest of those that were tried, or within 2% of it. The others were
// fused loops, prefetch, non-temporal stores, and other lengths of runs.
constexpr std::int64_t kRun = 1024;
constexpr std::int64_t kReadRun = 256;
constexpr std::int64_t kSmallestTile = 65536;  // longer than the engine's

std::int64_t tile_of(std::int64_t n, int threads) {
  const std::int64_t share = n / (threads * 32) / kRun * kRun;
  return share > kSmallestTile ? share : kSmallestTile;
}

using Lanes [[gnu::vector_size(64)]] = float;  // a vector, or they would not stay in registers

void add(Lanes& lanes, const float* x, std::int64_t n) {
  constexpr int width = sizeof(Lanes) / sizeof(float);
  for (std::int64_t i = 0; i + width <= n; i += width) {
    Lanes next;
    std::memcpy(&next, x + i, sizeof(Lanes));
    lanes += next;
  }
}

float read(float* const* streams, int n_streams, std::int64_t n, int threads) {
  const std::int64_t tile = tile_of(n, threads);
  float first = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : first)
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const std::int64_t end = begin + tile < n ? begin + tile : n;
    Lanes lanes = {};
    for (std::int64_t at = begin; at < end; at += kReadRun) {
      for (int k = 0; k < n_streams; ++k) add(lanes, streams[k] + at, end - at < kReadRun ? end - at : kReadRun);
    }
    first += lanes[0];
  }
  return first;
}

void update(float* const* streams, int n_streams, std::int64_t n, int threads) {
  const std::int64_t tile = tile_of(n, threads);
  const float* const gradient = streams[1];
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const std::int64_t end = begin + tile < n ? begin + tile : n;
    for (std::int64_t at = begin; at < end; at += kRun) {
      const std::int64_t stop = at + kRun < end ? at + kRun : end;
      for (int k = 0; k < n_streams; ++k) {
        if (k == 1) continue;
        float* const u = streams[k];
        for (std::int64_t i = at; i < stop; ++i) u[i] = u[i] * 0.5f + gradient[i];
      }
    }
  }
}

}  // namespace

float stream(float* const* streams, int n_streams, int measured, std::int64_t n, int threads) {
  const float read_first = measured ? read(streams, measured, n, threads) : 0;
  update(streams, n_streams, n, threads);
  return read_first;
}

}  // namespace fusedopt::cpu
