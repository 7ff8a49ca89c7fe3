#include "cpu/runs.h"

#include <array>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cpu/halves.h"

namespace fusedopt::cpu {
namespace {

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

using Half = std::uint16_t;

}  // namespace

void widen(float* to, const Half* from, std::int64_t n) {
  each_pair(n, [](float* out, const Half* in) { store(out, value(load<Halves>(in))); }, to, from);
}

void round_nearest(Half* to, const float* from, std::int64_t n) {
  each_pair(n, [](Half* out, const float* in) { store(out, nearest(load_two<Floats>(in))); }, to, from);
}

void join(float* to, const Half* visible, const Half* low, std::int64_t n) {
  each_pair(
      n, [](float* out, const Half* in, const Half* rest) { store(out, join(load<Halves>(in), load<Halves>(rest))); },
      to, visible, low);
}

void split(Half* visible, Half* low, const float* from, std::int64_t n) {
  each_pair(
      n,
      [](Half* out, Half* rest, const float* in) {
        const auto x = load_two<Floats>(in);
        store(out, away(x));
        store(rest, missing(x));
      },
      visible, low, from);
}

void current(float* to, const Half* visible, const float* master, std::int64_t n) {
  each_pair(
      n,
      [](float* out, const Half* in, const float* whole) {
        store(out, current(load<Halves>(in), load_two<Floats>(whole)));
      },
      to, visible, master);
}

void round_away(Half* to, const float* from, std::int64_t n) {
  each_pair(n, [](Half* out, const float* in) { store(out, away(load_two<Floats>(in))); }, to, from);
}

void round_by(Half* to, const float* from, const std::uint32_t* random, std::int64_t n) {
  each_pair(
      n,
      [](Half* out, const float* in, const std::uint32_t* word) {
        store(out, rounded_by(load_two<Floats>(in), load_two<Words>(word)));
      },
      to, from, random);
}

}  // namespace fusedopt::cpu
