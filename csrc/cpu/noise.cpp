#include "cpu/noise.h"

#include "cpu/blocks.h"
#include "cpu/layout.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fusedopt::cpu {
namespace {

constexpr int kGroups = 32;  // of four elements, that are drawn at once: 8% faster than 16
constexpr int kDrawn = 4 * kGroups;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 8;
constexpr int kParts = kGroups / kLanes;

// Words in the lower halves; what is in the upper ones does not matter.
using Lanes [[gnu::vector_size(kBytes)]] = std::uint64_t;
using Words [[gnu::vector_size(kBytes / 2)]] = std::uint32_t;

// The product of the words. Compilers multiply all of the 64 bits, which takes several times as long.
inline Lanes product(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

inline Lanes all(std::uint64_t x) { return Lanes{} + x; }

// philox() of kGroups counters in a row. Words [k][i] are number k of group i.
inline void draw_groups(const Draw& draw, std::int64_t first, std::uint32_t (&words)[4][kGroups]) {
  Lanes c[kParts][4], numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = static_cast<std::uint64_t>(lane);
  for (int part = 0; part < kParts; ++part) {
    const Lanes group = numbers + all(static_cast<std::uint64_t>(first + part * kLanes));
    c[part][0] = group;
    c[part][1] = group >> 32;
    c[part][2] = all(draw.tensor);
    c[part][3] = all(draw.step);
  }
  std::uint32_t key0 = draw.seed, key1 = draw.stream;
  for (int round = 0; round < 10; ++round) {
    for (auto& x : c) {
      const Lanes a = product(all(0xD2511F53), x[0]), b = product(all(0xCD9E8D57), x[2]);
      x[0] = (b >> 32) ^ x[1] ^ all(key0);
      x[1] = b;
      x[2] = (a >> 32) ^ x[3] ^ all(key1);
      x[3] = a;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int part = 0; part < kParts; ++part) {
    for (int k = 0; k < 4; ++k) {
      const auto lower = __builtin_convertvector(c[part][k], Words);
      __builtin_memcpy(words[k] + part * kLanes, &lower, sizeof(lower));
    }
  }
}

template <class T>
inline void draw_normals(const Draw& draw, std::int64_t first_group, T (&out)[kDrawn]) {
  std::uint32_t words[4][kGroups];
  draw_groups(draw, first_group, words);
  for (int i = 0; i < kGroups; ++i) {
    normal(words[0][i], words[1][i], out[4 * i], out[4 * i + 1]);
    normal(words[2][i], words[3][i], out[4 * i + 2], out[4 * i + 3]);
  }
}

// Of elements whose indices are [first, first + count).
template <class T>
void add_to_run(T* out, const T* g, T factor, T scale, const Draw& draw, std::int64_t first, std::int64_t count) {
  alignas(kLine) T drawn[kDrawn];
  const std::int64_t before = first & 3;  // of the first group
  for (std::int64_t done = -before; done < count; done += kDrawn) {
    draw_normals(draw, (first + done) >> 2, drawn);
    const std::int64_t from = done < 0 ? before : 0, to = count - done < kDrawn ? count - done : kDrawn;
    if (from == 0 && to == kDrawn) {
      FUSEDOPT_INDEPENDENT
      for (int i = 0; i < kDrawn; ++i) out[done + i] = factor * g[done + i] + scale * drawn[i];
    } else {
      for (std::int64_t i = from; i < to; ++i) out[done + i] = factor * g[done + i] + scale * drawn[i];
    }
  }
}

}  // namespace

template <class T>
void add_noise(T* out, const T* g, T factor, T scale, const Draw& draw, const Indices& indices, std::int64_t begin,
               std::int64_t count) {
  if (!indices.layout) return add_to_run(out, g, factor, scale, draw, indices.first + begin, count);
  walk(*indices.layout, begin, count, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
    if (stride == 1) return add_to_run(out + at, g + at, factor, scale, draw, indices.first + offset, n);
    for (std::int64_t i = 0; i < n; ++i) {
      out[at + i] = factor * g[at + i] + scale * normal<T>(draw, indices.first + offset + i * stride);
    }
  });
}

template void add_noise<float>(float*, const float*, float, float, const Draw&, const Indices&, std::int64_t,
                               std::int64_t);
template void add_noise<double>(double*, const double*, double, double, const Draw&, const Indices&, std::int64_t,
                                std::int64_t);

}  // namespace fusedopt::cpu
