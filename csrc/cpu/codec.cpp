#include "cpu/codec.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/layout.h"
#include "cpu/noise.h"
#include "cpu/quantize.h"
#include "cpu/runs.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fusedopt::cpu {
namespace {

struct bf16 {
  std::uint16_t bits;
};
using f16 = _Float16;

template <class T>
inline T value_of(bf16 x) {
  return static_cast<T>(std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16));
}
template <class T, class S>
inline T value_of(S x) {
  return static_cast<T>(x);
}

// Round to nearest even; a NaN stays a NaN.
inline bf16 to_bf16(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (u >> 16) | 0x40u;
  return {static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

// double -> bf16 rounds once: round to odd in float first, so that the second rounding sees the lost bits.
inline bf16 to_bf16(double x) {
  const float nearest = static_cast<float>(x);
  std::uint32_t u = std::bit_cast<std::uint32_t>(nearest);
  const double error = x - static_cast<double>(nearest);
  if (error != 0 && error == error && (u & 1u) == 0) {
    const bool away = (error > 0) == (x > 0);  // the true value lies farther from zero
    u = away ? u | 1u : u - 1u;
  }
  return to_bf16(std::bit_cast<float>(u));
}

template <class D, class T>
inline D stored(T x) {
  if constexpr (std::is_same_v<D, bf16>) {
    return to_bf16(x);
  } else {
    return static_cast<D>(x);
  }
}

template <class T, class S>
inline void decode_run(T* to, const S* from, std::int64_t n) {
  std::int64_t i = 0;
  if constexpr (std::is_same_v<T, float> && std::is_same_v<S, bf16>) return widen(to, &from->bits, n);
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<S, f16>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) to[i] = value_of<T>(from[i]);
}

template <class T, class D>
inline void encode_run(D* to, const T* from, std::int64_t n) {
  std::int64_t i = 0;
  if constexpr (std::is_same_v<T, float> && std::is_same_v<D, bf16>) return round_nearest(&to->bits, from, n);
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<D, f16>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
  }
#endif
  for (; i < n; ++i) to[i] = stored<D>(from[i]);
}

template <class Call>
inline void with_type(Codec codec, Call call) {
  switch (codec) {
    case Codec::f32:
      return call(float{});
    case Codec::f64:
      return call(double{});
    case Codec::f16:
      return call(f16{});
    default:
      return call(bf16{});
  }
}

// A float16 parameter, rounded to the nearest even.
void from_half_master(float* to, const f16* from, const float* master, std::int64_t n) {
  f16 rounded[kTile];
  encode_run(rounded, master, n);
  for (std::int64_t i = 0; i < n; ++i) {
    const bool is_its = std::bit_cast<std::uint16_t>(rounded[i]) == std::bit_cast<std::uint16_t>(from[i]);
    to[i] = is_its ? master[i] : static_cast<float>(from[i]);
  }
}

// ------------------------------------------------------------------------------------------------------ as it lies

// Elements of one address, one after another: where they are, or a copy of those that are not dense.
template <class S>
class Run {
 public:
  Run(void* address, const Layout* layout, std::int64_t begin, std::int64_t count)
      : address_(static_cast<S*>(address)), layout_(layout), begin_(begin), count_(count) {
    values_ = layout ? copies_ : address_ + begin;
  }

  S* get() {
    each([](S& copy, S& element) { copy = element; });
    return values_;
  }
  S* values() { return values_; }
  void put() {
    each([](S& copy, S& element) { element = copy; });
  }
  void put(const S* from) {
    std::memcpy(values_, from, sizeof(S) * static_cast<std::size_t>(count_));
    put();
  }

 private:
  template <class Move>
  void each(Move move) {
    if (!layout_) return;
    walk(*layout_, begin_, count_, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) move(copies_[at + i], address_[offset + i * stride]);
    });
  }

  S* const address_;
  const Layout* const layout_;
  const std::int64_t begin_, count_;
  S* values_;
  S copies_[kTile];
};

template <class S>
Run<S> elements(const Stored& of, std::int64_t begin, std::int64_t count) {
  return {of.address(), of.layout(), begin, count};
}
template <class S>
Run<S> partners(const Stored& of, std::int64_t begin, std::int64_t count) {
  return {of.partner(), of.partner_layout(), begin, count};
}

// Calls body(at, n, scale) for blocks: the place of each among elements [begin, begin + count), and its scale.
template <class Body>
void each_scale(const Stored& of, std::int64_t begin, std::int64_t count, Body body) {
  float* const scales = static_cast<float*>(of.partner());
  for (std::int64_t at = 0; at < count;) {
    const std::int64_t element = begin + at, left = of.row.slice - element % of.row.slice;
    const std::int64_t n = std::min({left, count - at, kBlockElements});
    body(at, static_cast<int>(n), scales[block_of(of.row, element)]);
    at += n;
  }
}

template <class T>
void decode_plain(T* values, const Stored& from, std::int64_t begin, std::int64_t count) {
  const Layout* const layout = from.layout();
  with_type(from.codec(), [&](auto element) {
    using S = decltype(element);
    const S* source = static_cast<const S*>(from.address());
    if (!layout) return decode_run(values, source + begin, count);
    walk(*layout, begin, count, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) values[at + i] = value_of<T>(source[offset + i * stride]);
    });
  });
}

template <class T>
void encode_plain(const T* values, const Stored& to, std::int64_t begin, std::int64_t count) {
  const Layout* const layout = to.layout();
  with_type(to.codec(), [&](auto element) {
    using D = decltype(element);
    D* target = static_cast<D*>(to.address());
    if (!layout) return encode_run(target + begin, values, count);
    walk(*layout, begin, count, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) target[offset + i * stride] = stored<D>(values[at + i]);
    });
  });
}

// The words of an operand of a row, by which it is rounded in a step.
void draw_words_of(std::uint32_t* words, const Stored& of, std::int64_t begin, std::int64_t count, std::uint32_t step) {
  const Drawing& drawing = *of.row.drawing;
  const auto own = static_cast<std::uint32_t>(of.operand);
  const std::uint32_t stream = drawing.stream + (of.operand ? kStateStream + own - kFirstState : kParamStream);
  draw_words(words, Drawn({kRoundingSeed, stream, drawing.tensor, step}, drawing.indices), begin, count);
}

void decode_others(float* values, const Stored& from, std::int64_t begin, std::int64_t count) {
  switch (from.codec()) {
    case Codec::split:
      return join(values, elements<std::uint16_t>(from, begin, count).get(),
                  partners<std::uint16_t>(from, begin, count).get(), count);
    case Codec::master_bf16:
      return current(values, elements<std::uint16_t>(from, begin, count).get(),
                     partners<float>(from, begin, count).get(), count);
    case Codec::master_f16:
      return from_half_master(values, elements<f16>(from, begin, count).get(),
                              partners<float>(from, begin, count).get(), count);
    default: {
      auto codes = elements<std::uint8_t>(from, begin, count);
      const std::uint8_t* const source = codes.get();
      each_scale(from, begin, count, [&](std::int64_t at, int n, float scale) {
        dequantize(values + at, source + at, scale, from.codec(), n);
      });
    }
  }
}

void encode_others(const float* values, const Stored& to, std::int64_t begin, std::int64_t count, std::uint32_t step) {
  switch (to.codec()) {
    case Codec::split: {
      auto visible = elements<std::uint16_t>(to, begin, count), low = partners<std::uint16_t>(to, begin, count);
      split(visible.values(), low.values(), values, count);
      visible.put();
      return low.put();
    }
    case Codec::master_bf16: {
      auto visible = elements<std::uint16_t>(to, begin, count);
      round_away(visible.values(), values, count);
      visible.put();
      return partners<float>(to, begin, count).put(values);
    }
    case Codec::master_f16: {
      auto visible = elements<f16>(to, begin, count);
      encode_run(visible.values(), values, count);
      visible.put();
      return partners<float>(to, begin, count).put(values);
    }
    case Codec::stochastic: {
      auto rounded = elements<std::uint16_t>(to, begin, count);
      alignas(kLine) std::uint32_t words[kTile];
      draw_words_of(words, to, begin, count, step);
      round_by(rounded.values(), values, words, count);
      return rounded.put();
    }
    default: {
      auto codes = elements<std::uint8_t>(to, begin, count);
      each_scale(to, begin, count, [&](std::int64_t at, int n, float& scale) {
        scale = quantize(codes.values() + at, values + at, to.codec(), n);
      });
      codes.put();
    }
  }
}

}  // namespace

template <class T>
void decode(T* values, const Stored& from, std::int64_t begin, std::int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (!is_plain(from.codec()) && from.codec() != Codec::stochastic) return decode_others(values, from, begin, count);
  }
  decode_plain(values, from, begin, count);
}

// Parameters of double are stored as they are.
template <class T>
void encode(const T* values, const Stored& to, std::int64_t begin, std::int64_t count, std::uint32_t step) {
  if constexpr (std::is_same_v<T, float>) {
    if (!is_plain(to.codec())) return encode_others(values, to, begin, count, step);
  }
  encode_plain(values, to, begin, count);
}

void* scratch(std::size_t bytes) {
  thread_local std::vector<std::byte> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data();
}

template void decode<float>(float*, const Stored&, std::int64_t, std::int64_t);
template void decode<double>(double*, const Stored&, std::int64_t, std::int64_t);
template void encode<float>(const float*, const Stored&, std::int64_t, std::int64_t, std::uint32_t);
template void encode<double>(const double*, const Stored&, std::int64_t, std::int64_t, std::uint32_t);

}  // namespace fusedopt::cpu
