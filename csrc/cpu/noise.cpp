#include "cpu/noise.h"

#include <cmath>
#include <utility>

#include "cpu/blocks.h"
#include "cpu/layout.h"
#include "cpu/vectors.h"

namespace fusedopt::cpu {
namespace {

constexpr int kVectors = 2;  // of groups that are drawn at once: with one, most of the work waits for the rest
constexpr int kDrawn = 4 * kWords * kVectors;

// Vectors: what philox.h's formulas are computed in.
struct Several {
  using Float = Floats;
  using Int = Ints;
  using Word = Words;
  static Float number(Int x) { return __builtin_convertvector(x, Float); }
  static Float root(Float x) { return square_root(x); }
};
// Words in the lower halves; what is in the upper ones does not matter.
using Lanes [[gnu::vector_size(kBytes)]] = std::uint64_t;

inline Lanes all(std::uint64_t x) { return Lanes{} + x; }

// The product of the words. Compilers multiply all of the 64 bits, which takes several times as long.
inline Lanes product(Lanes a, Lanes b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Lanes>(
      _mm512_maskz_mul_epu32(-1, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & all(0xffffffff)) * (b & all(0xffffffff));
#endif
}

template <class Vector, int... k>
inline Vector even_of(Vector a, Vector b, std::integer_sequence<int, k...>) {
  return __builtin_shufflevector(a, b, (k % 2 ? kWords + k - 1 : k)...);
}
template <class Vector, int... k>
inline Vector odd_of(Vector a, std::integer_sequence<int, k...>) {
  return __builtin_shufflevector(a, a, (k | 1)...);
}
template <int From, class Vector, int... k>
inline Vector alternating(Vector a, Vector b, std::integer_sequence<int, k...>) {
  return __builtin_shufflevector(a, b, (From + k / 2 + k % 2 * kWords)...);
}
using Indexes = std::make_integer_sequence<int, kWords>;

// The lower halves of both, in turn.
inline Words lower(Lanes a, Lanes b) {
  return even_of(reinterpret_cast<Words>(a), reinterpret_cast<Words>(b), Indexes());
}

// The upper halves as lower ones. A shift would wait for the unit that multiplies.
inline Lanes upper(Lanes x) { return reinterpret_cast<Lanes>(odd_of(reinterpret_cast<Words>(x), Indexes())); }

// a[0], b[0], a[1], b[1], and so on: the first vector of them and the second.
inline Floats first_of(Floats a, Floats b) { return alternating<0>(a, b, Indexes()); }
inline Floats second_of(Floats a, Floats b) { return alternating<kWords / 2>(a, b, Indexes()); }

// philox() of groups in a row. Of two parts one has the even groups and one the odd.
[[gnu::noinline]] void draw_groups(const Drawn& drawn, std::int64_t first, Words (&words)[kVectors][4]) {
  constexpr int parts = 2 * kVectors;
  Lanes c[parts][4], numbers;
  for (int lane = 0; lane < kWords / 2; ++lane) numbers[lane] = static_cast<std::uint64_t>(2 * lane);
  for (int part = 0; part < parts; ++part) {
    const Lanes group = numbers + all(static_cast<std::uint64_t>(first + part / 2 * kWords + part % 2));
    c[part][0] = group;
    c[part][1] = group >> 32;
    c[part][2] = all(drawn.draw.tensor);
    c[part][3] = all(drawn.draw.step);
  }
#pragma GCC unroll 10  // kPhiloxRounds
  for (const auto& key : drawn.keys) {
    for (auto& x : c) {
      const Lanes a = product(all(kMultiplier0), x[0]), b = product(all(kMultiplier1), x[2]);
      x[0] = upper(b) ^ x[1] ^ all(key[0]);
      x[1] = b;
      x[2] = upper(a) ^ x[3] ^ all(key[1]);
      x[3] = a;
    }
  }
  for (int part = 0; part < parts; part += 2) {
    for (int k = 0; k < 4; ++k) words[part / 2][k] = lower(c[part][k], c[part + 1][k]);
  }
}

inline void add_to_vector(float* out, const float* g, float factor, Floats noise) {
  Floats x;
  __builtin_memcpy(&x, g, kBytes);
  x = factor * x + noise;
  __builtin_memcpy(out, &x, kBytes);
}

// Not inlined, as draw_groups() is not, so that each has all of the registers.
[[gnu::noinline]] void add_normals(float* out, const float* g, float factor, float scale,
                                   const Words (&words)[kVectors][4]) {
  for (const auto& w : words) {
    Floats x[2], y[2];
    for (int half = 0; half < 2; ++half) {
      Floats cosine, sine;
      direction<Several>(w[2 * half + 1], cosine, sine);
      const Floats r = radius<Several>(w[2 * half]) * scale;
      x[half] = r * cosine;
      y[half] = r * sine;
    }
    const Floats lower_x = first_of(x[0], x[1]), upper_x = second_of(x[0], x[1]);
    const Floats lower_y = first_of(y[0], y[1]), upper_y = second_of(y[0], y[1]);
    add_to_vector(out, g, factor, first_of(lower_x, lower_y));
    add_to_vector(out + kWords, g + kWords, factor, second_of(lower_x, lower_y));
    add_to_vector(out + 2 * kWords, g + 2 * kWords, factor, first_of(upper_x, upper_y));
    add_to_vector(out + 3 * kWords, g + 3 * kWords, factor, second_of(upper_x, upper_y));
    out += 4 * kWords;
    g += 4 * kWords;
  }
}

// Of groups in a row: in float, of whole batches.
[[gnu::noinline]] void add_to_batches(float* out, const float* g, float factor, const Noise& noise, std::int64_t group,
                                      std::int64_t count) {
  for (std::int64_t done = 0; done < count; done += kDrawn) {
    Words words[kVectors][4];
    // Of what the step reads, the gradients are missing: 3% of its time.
    for (int i = 0; i < kDrawn; i += kBlock<float>) __builtin_prefetch(g + done + kAhead / 4 + i);
    draw_groups(noise, group + done / 4, words);
    add_normals(out + done, g + done, factor, static_cast<float>(noise.scale), words);
  }
}

// The same in double, group by group.
void add_to_batches(double* out, const double* g, double factor, const Noise& noise, std::int64_t group,
                    std::int64_t count) {
  for (std::int64_t done = 0; done < count; done += 4) {
    std::uint32_t words[4];
    noise.draw.words(group + done / 4, words);
    double drawn[4];
    normal(words[0], words[1], drawn[0], drawn[1]);
    normal(words[2], words[3], drawn[2], drawn[3]);
    for (int k = 0; k < 4; ++k) out[done + k] = factor * g[done + k] + noise.scale * drawn[k];
  }
}

// Calls draw_part(begin, end) for the parts of a run of elements, whose indices begin with `first`, that are less than
// batches, and draw_whole(begin, count) for what is whole batches.
template <class Part, class Whole>
void each_batch(std::int64_t first, std::int64_t count, Part draw_part, Whole draw_whole) {
  std::int64_t begin = 0;
  if (const std::int64_t after = -first & 3; after) draw_part(0, begin = after < count ? after : count);
  const std::int64_t whole = (count - begin) / kDrawn * kDrawn;
  draw_whole(begin, whole);
  if (begin + whole < count) draw_part(begin + whole, count);
}

// Of elements whose indices are [first, first + count).
template <class T>
void add_to_run(T* out, const T* g, T factor, const Noise& noise, std::int64_t first, std::int64_t count) {
  const auto add_to_part = [&](std::int64_t begin, std::int64_t end) {  // of a batch
    const std::int64_t before = (first + begin) & 3;                    // of the first group
    alignas(kLine) T part[kDrawn] = {};
    for (std::int64_t i = begin; i < end; ++i) part[before + i - begin] = g[i];
    add_to_batches(part, part, factor, noise, (first + begin) >> 2, (before + end - begin + 3) & ~3);
    for (std::int64_t i = begin; i < end; ++i) out[i] = part[before + i - begin];
  };
  each_batch(first, count, add_to_part, [&](std::int64_t begin, std::int64_t whole) {
    add_to_batches(out + begin, g + begin, factor, noise, (first + begin) >> 2, whole);
  });
}

// The words of groups in a row, of whole batches.
void words_of_batches(std::uint32_t* out, const Drawn& drawn, std::int64_t group, std::int64_t count) {
  for (std::int64_t done = 0; done < count; done += kDrawn) {
    Words words[kVectors][4];
    draw_groups(drawn, group + done / 4, words);
    for (const auto& w : words) {
      Floats x[4];
      for (int k = 0; k < 4; ++k) x[k] = reinterpret_cast<Floats>(w[k]);
      const Floats even[2] = {first_of(x[0], x[2]), second_of(x[0], x[2])};
      const Floats odd[2] = {first_of(x[1], x[3]), second_of(x[1], x[3])};
      for (int half = 0; half < 2; ++half) {
        const Floats in_order[2] = {first_of(even[half], odd[half]), second_of(even[half], odd[half])};
        __builtin_memcpy(out, in_order, sizeof(in_order));
        out += 2 * kWords;
      }
    }
  }
}

void words_of_run(std::uint32_t* out, const Drawn& drawn, std::int64_t first, std::int64_t count) {
  const auto draw_part = [&](std::int64_t begin, std::int64_t end) {
    alignas(kLine) std::uint32_t part[kDrawn];
    words_of_batches(part, drawn, (first + begin) >> 2, kDrawn);
    for (std::int64_t i = begin, before = (first + begin) & 3; i < end; ++i) out[i] = part[before + i - begin];
  };
  each_batch(first, count, draw_part, [&](std::int64_t begin, std::int64_t whole) {
    words_of_batches(out + begin, drawn, (first + begin) >> 2, whole);
  });
}

}  // namespace

Drawn::Drawn(const Draw& draw, const Indices& indices) : draw(draw), indices(indices) {
  std::uint32_t key0 = draw.seed, key1 = draw.stream;
  for (auto& key : keys) {
    key[0] = key0;
    key[1] = key1;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

template <class T>
void add_noise(T* out, const T* g, T factor, const Noise& noise, std::int64_t begin, std::int64_t count) {
  const Indices& indices = noise.indices;
  if (!indices.layout) return add_to_run(out, g, factor, noise, indices.first + begin, count);
  const T scale = static_cast<T>(noise.scale);
  walk(*indices.layout, begin, count, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
    if (stride == 1) return add_to_run(out + at, g + at, factor, noise, indices.first + offset, n);
    for (std::int64_t i = 0; i < n; ++i) {
      out[at + i] = factor * g[at + i] + scale * normal<T>(noise.draw, indices.first + offset + i * stride);
    }
  });
}

void draw_words(std::uint32_t* out, const Drawn& drawn, std::int64_t begin, std::int64_t count) {
  const Indices& indices = drawn.indices;
  if (!indices.layout) return words_of_run(out, drawn, indices.first + begin, count);
  walk(*indices.layout, begin, count, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
    if (stride == 1) return words_of_run(out + at, drawn, indices.first + offset, n);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t element = indices.first + offset + i * stride;
      std::uint32_t words[4];
      drawn.draw.words(element >> 2, words);
      out[at + i] = words[element & 3];
    }
  });
}

template void add_noise<float>(float*, const float*, float, const Noise&, std::int64_t, std::int64_t);
template void add_noise<double>(double*, const double*, double, const Noise&, std::int64_t, std::int64_t);

}  // namespace fusedopt::cpu
