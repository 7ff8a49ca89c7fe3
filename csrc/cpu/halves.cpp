#include "cpu/halves.h"

#include <array>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/vectors.h"

namespace fusedopt::cpu {
namespace {

constexpr std::uint32_t kQuiet = 0x400000u;

inline Words words(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats floats(Words x) { return reinterpret_cast<Floats>(x); }

// Bits that were rounded, where x is a number; else a quiet NaN.
inline Words or_nan(Floats x, Words rounded) { return x == x ? rounded : words(x) | kQuiet; }
inline Words nearest(Floats x) { return or_nan(x, words(x) + 0x7fffu + ((words(x) >> 16) & 1u)); }
inline Words away(Floats x) { return or_nan(x, words(x) + 0x8000u); }

inline Words as_upper(const std::uint16_t* from) { return widen(from) << 16; }
inline Words with_sign(const std::uint16_t* from) {
  return reinterpret_cast<Words>(reinterpret_cast<Ints>(as_upper(from)) >> 16);
}

constexpr int kPair = 2 * kWords;

template <class T>
void copy_in(T* copy, const T* run, std::size_t n) {
  std::memcpy(copy, run, sizeof(T) * n);
}
template <class T>
void copy_out(const T* copy, T* run, std::size_t n) {
  std::memcpy(run, copy, sizeof(T) * n);
}
template <class T>
void copy_out(const T*, const T*, std::size_t) {}

// Calls body(runs...) for each kPair elements of some runs of n, and for copies of those that are left, behind which
// are others.
template <class Body, class... T>
inline void each_pair(std::int64_t n, Body body, T*... runs) {
  std::int64_t i = 0;
  for (; i + kPair <= n; i += kPair) body(runs + i...);
  if (i == n) return;
  std::tuple<std::array<std::remove_const_t<T>, kPair>...> copies{};
  const auto rest = static_cast<std::size_t>(n - i);
  const auto each = [&]<std::size_t... k>(std::index_sequence<k...>) {
    (copy_in(std::get<k>(copies).data(), runs + i, rest), ...);
    body(std::get<k>(copies).data()...);
    (copy_out(std::get<k>(copies).data(), runs + i, rest), ...);
  };
  each(std::index_sequence_for<T...>());
}

// The same for vectors one by one.
template <class Body, class... T>
inline void each_vector(std::int64_t n, Body body, T*... runs) {
  each_pair(
      n,
      [&](auto*... pair) {
        body(pair...);
        body(pair + kWords...);
      },
      runs...);
}

}  // namespace

void widen_bf16(float* to, const std::uint16_t* from, std::int64_t n) {
  each_vector(n, [](float* out, const std::uint16_t* in) { store(out, as_upper(in)); }, to, from);
}

void round_bf16(std::uint16_t* to, const float* from, std::int64_t n) {
  each_pair(
      n,
      [](std::uint16_t* out, const float* in) {
        store_upper(out, nearest(load<Floats>(in)), nearest(load<Floats>(in + kWords)));
      },
      to, from);
}

// A zero or infinity that is none of the master's would make NaN of what is missing to another.
void join(float* to, const std::uint16_t* visible, const std::uint16_t* low, std::int64_t n) {
  each_vector(
      n,
      [](float* out, const std::uint16_t* in, const std::uint16_t* missing) {
        const Floats own = floats(as_upper(in)), all = floats(as_upper(in) + with_sign(missing));
        store(out, all == all ? all : own);
      },
      to, visible, low);
}

void split(std::uint16_t* visible, std::uint16_t* low, const float* from, std::int64_t n) {
  each_pair(
      n,
      [](std::uint16_t* upper, std::uint16_t* lower, const float* in) {
        const Floats a = load<Floats>(in), b = load<Floats>(in + kWords);
        store_upper(upper, away(a), away(b));
        store_lower(lower, a == a ? words(a) : Words{}, b == b ? words(b) : Words{});
      },
      visible, low, from);
}

void current_master(float* to, const std::uint16_t* visible, const float* master, std::int64_t n) {
  each_vector(
      n,
      [](float* out, const std::uint16_t* in, const float* whole) {
        const Floats x = load<Floats>(whole);
        const Words own = as_upper(in);
        store(out, (away(x) ^ own) >> 16 == 0 ? words(x) : own);
      },
      to, visible, master);
}

void round_master(std::uint16_t* to, const float* master, std::int64_t n) {
  each_pair(
      n,
      [](std::uint16_t* out, const float* in) {
        store_upper(out, away(load<Floats>(in)), away(load<Floats>(in + kWords)));
      },
      to, master);
}

void round_bf16_by(std::uint16_t* to, const float* from, const std::uint32_t* random, std::int64_t n) {
  each_pair(
      n,
      [](std::uint16_t* out, const float* in, const std::uint32_t* bits) {
        const Floats a = load<Floats>(in), b = load<Floats>(in + kWords);
        const Words more_a = load<Words>(bits) >> 16, more_b = load<Words>(bits + kWords) >> 16;
        store_upper(out, or_nan(a, words(a) + more_a), or_nan(b, words(b) + more_b));
      },
      to, from, random);
}

}  // namespace fusedopt::cpu
