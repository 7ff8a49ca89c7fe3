// The unit of work: some operands' elements, fetched as values of the compute type, and put back.
#pragma once

#include <type_traits>

#include "cpu/codec.h"

namespace fusedopt::cpu {

constexpr std::int64_t kShortTile = 128;  // where a tile is gone through more than once: 10% faster than 1024
static_assert(kShortTile <= kBlockElements && kBlockElements <= kTile);

// Up to N operands of a row, from First on. One that is dense and of type T is used where it is; others pass through
// buffers.
template <class T, int First, int N>
class Tile {
 public:
  // step: which of the row's steps it is, from 0 on, where something is rounded by random words.
  explicit Tile(const Row& row, int n = N, std::uint32_t step = 0) : row_(row), n_(n), step_(step) {
    for (int k = 0; k < n_; ++k) all_in_place_ &= in_place(k);
    if (!all_in_place_) buffers_ = static_cast<T*>(scratch(sizeof(T) * N * kTile));
  }

  // Whether nothing passes through buffers.
  bool is_in_place() const { return all_in_place_; }

  // How many elements to fetch at a time.
  std::int64_t size() const { return all_in_place_ ? kAnySize : kBlockElements; }

  // The values of elements [begin, begin + count), operand by operand. Nothing is asked for ahead: processors do that
  // better, where a step is bound by computation.
  T* const* fetch(std::int64_t begin, std::int64_t count) {
    for (int k = 0; k < n_; ++k) {
      values_[k] = static_cast<T*>(row_.addresses[First + k]) + begin;
      if (all_in_place_) continue;
      if (in_place(k)) continue;
      values_[k] = buffers_ + k * kTile;
      decode(values_[k], stored(k), begin, count);
    }
    return values_;
  }

  // Rounds them into the operands; gradients stay as they are.
  void put(std::int64_t begin, std::int64_t count) const {
    for (int k = 0; k < n_ && !all_in_place_; ++k) {
      if (!in_place(k) && First + k != kGrad) encode(values_[k], stored(k), begin, count, step_);
    }
  }

 private:
  static constexpr Codec kInPlace = std::is_same_v<T, float> ? Codec::f32 : Codec::f64;
  static constexpr std::int64_t kAnySize = INT64_MAX;

  Stored stored(int k) const { return {row_, First + k}; }
  bool in_place(int k) const {
    return row_.codecs[First + k] == kInPlace && !(row_.layouts && row_.layouts[First + k]);
  }

  const Row& row_;
  const int n_;
  const std::uint32_t step_;
  bool all_in_place_ = true;
  T* values_[N];
  T* buffers_ = nullptr;
};

// Calls body(begin, count) for each tile of a segment. None cuts blocks, for which they must be long enough.
template <class Body>
inline void each_tile(const Segment& segment, std::int64_t size, Body body) {
  for (std::int64_t begin = segment.begin; begin < segment.end;) {
    std::int64_t end = segment.end;
    if (end - begin > size) end = whole_blocks(segment.row, begin + size);
    body(begin, end - begin);
    begin = end;
  }
}

}  // namespace fusedopt::cpu
