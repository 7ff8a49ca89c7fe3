// The unit of work: some operands' elements, fetched as values of the compute type, and put back.
#pragma once

#include <type_traits>

#include "cpu/codec.h"

namespace fusedopt::cpu {

constexpr std::int64_t kTile = 1024;      // elements of a tile that passes through buffers: six of 4 KiB stay in L1
constexpr std::int64_t kShortTile = 128;  // where a tile is gone through more than once: 10% faster than 1024

// Up to N operands of a row, from First on. One that is dense and of type T is used where it is; others pass through
// buffers.
template <class T, int First, int N>
class Tile {
 public:
  explicit Tile(const Row& row, int n = N) : row_(row), n_(n) {
    for (int k = 0; k < n_; ++k) all_in_place_ &= in_place(k);
    if (!all_in_place_) buffers_ = static_cast<T*>(scratch(sizeof(T) * N * kTile));
  }

  // How many elements to fetch at a time.
  std::int64_t size() const { return all_in_place_ ? kAnySize : kTile; }

  // The values of elements [begin, begin + count), operand by operand. Others are to come, up to `last`.
  T* const* fetch(std::int64_t begin, std::int64_t count, std::int64_t last) {
    for (int k = 0; k < n_; ++k) {
      values_[k] = static_cast<T*>(address(k)) + begin;
      if (all_in_place_ || in_place(k)) continue;
      values_[k] = buffers_ + k * kTile;
      decode(values_[k], address(k), codec(k), layout(k), begin, count, last);
    }
    return values_;
  }

  // Rounds them into the operands; gradients stay as they are.
  void put(std::int64_t begin, std::int64_t count) const {
    for (int k = 0; k < n_ && !all_in_place_; ++k) {
      if (!in_place(k) && First + k != kGrad) encode(values_[k], address(k), codec(k), layout(k), begin, count);
    }
  }

 private:
  static constexpr Codec kInPlace = std::is_same_v<T, float> ? Codec::f32 : Codec::f64;
  static constexpr std::int64_t kAnySize = INT64_MAX;

  void* address(int k) const { return row_.addresses[First + k]; }
  Codec codec(int k) const { return row_.codecs[First + k]; }
  bool in_place(int k) const { return codec(k) == kInPlace && !layout(k); }
  const Layout* layout(int k) const { return row_.layouts ? row_.layouts[First + k] : nullptr; }

  const Row& row_;
  const int n_;
  bool all_in_place_ = true;
  T* values_[N];
  T* buffers_ = nullptr;
};

// Calls body(begin, count) for each tile of a segment.
template <class Body>
inline void each_tile(const Segment& segment, std::int64_t size, Body body) {
  for (std::int64_t begin = segment.begin; begin < segment.end;) {
    const std::int64_t count = segment.end - begin < size ? segment.end - begin : size;
    body(begin, count);
    begin += count;
  }
}

}  // namespace fusedopt::cpu
