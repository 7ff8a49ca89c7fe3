// A lane's elements of all operands of a row: fetched, decoded to values, and encoded and put back.
#pragma once

#include "cuda/codecs.cuh"
#include "cuda/options.cuh"

namespace fusedopt::cuda {

// The largest magnitudes of N states' values in blocks of codes, as bits. Where a lane has few elements at a time, they
// are found before anything is written, by a first pass over the block.
template <int N>
struct Largest {
  unsigned of[N + 1] = {};
  bool is_first = false;

  __device__ __forceinline__ void add(int state, float value) {
    of[state] = max(of[state], __float_as_uint(value) & kMagnitude);
  }
  __device__ __forceinline__ void combine() {
#pragma unroll
    for (int k = 0; k < N; ++k) of[k] = largest_of(of[k]);
  }
};

// The N operands of a rule, and of those of its states that are blocks of 8-bit codes the way to memory and back. None
// is, unless Coded.
template <class Fetch, class T, int N, bool Coded>
struct Codes {
  static constexpr int kStates = N - kFirstState;
  static constexpr int kCount = Fetch::kCount;
  static constexpr bool kHasCodes = Coded && Fetch::kTakesBlocks;
  static constexpr bool kHasPairs = kHasCodes && kCount > 1;  // of whole tiles

  typename Fetch::Raw raw[N];
  T values[N][kCount];

  template <class Row>
  __device__ __forceinline__ void decode_codes(const Row& row, const Fetch& at, int k) {
    const Codec codec = row.signature.codec(k);
    const float* scales = global<const float>(row.address[k][1]);
    const float root = sqrtf(at.is_active(0) ? scales[at.block(0)] : 0) / levels(codec);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[k][i] = dequantized(Fetch::byte(raw[k], i), root, codec);
  }

  // A whole tile is a block; of others the block has been gone through before.
  template <class Row>
  __device__ __forceinline__ void put_codes(const Row& row, const Fetch& at, int k, unsigned most) {
    const Codec codec = row.signature.codec(k);
    if constexpr (kHasPairs) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        most = max(most, __float_as_uint(static_cast<float>(values[k][i])) & kMagnitude);
      }
      most = largest_of(most);
    }
    const Scale scale(most, codec);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Fetch::set_byte(raw[k], i, scale.code(static_cast<float>(values[k][i]), codec));
    }
    if constexpr (kHasPairs) {
      if (lane_id() == 0) global<float>(row.address[k][1])[at.block(0)] = scale.scale;
    } else {
      at.put(raw[k], row.address[k][0], codec, k);
    }
  }

  // Codes of two states at a time, 16 bytes for each lane: the lower lanes have the first's, the upper ones the
  // second's. A lane's own eight are half of what another has.
  template <class Row>
  static __device__ __forceinline__ uint4* pair_of(const Row& row, const Fetch& at, int k) {
    const bool is_upper = lane_id() >= 16;
    const int second = k + 1 < N ? k + 1 : k;
    const bool has_first = has_blocks(row.signature.codec(k));
    const bool has_second = k + 1 < N && has_blocks(row.signature.codec(second));
    const std::int64_t address = is_upper ? row.address[second][0] : row.address[k][0];
    const bool has_codes = is_upper ? has_second : has_first;
    return has_codes ? global<uint4>(address + at.tile() + lane_id() % 16 * 16) : nullptr;
  }

  template <class Row>
  __device__ __forceinline__ void fetch_pairs(const Row& row, const Fetch& at) {
    uint4 codes[kStates / 2 + 1];
#pragma unroll
    for (int k = kFirstState; k < N; k += 2) {
      const uint4* const from = pair_of(row, at, k);
      codes[(k - kFirstState) / 2] = from ? *from : uint4{};
    }
#pragma unroll
    for (int k = kFirstState; k < N; ++k) {
      const uint4& have = codes[(k - kFirstState) / 2];
      const int lane = (k - kFirstState) % 2 * 16 + lane_id() / 2;
      const unsigned x = __shfl_sync(kAll, have.x, lane), y = __shfl_sync(kAll, have.y, lane),
                     z = __shfl_sync(kAll, have.z, lane), w = __shfl_sync(kAll, have.w, lane);
      if (has_blocks(row.signature.codec(k))) {
        Fetch::word(raw[k], 0) = lane_id() % 2 ? z : x;
        Fetch::word(raw[k], 1) = lane_id() % 2 ? w : y;
      }
    }
  }

  template <class Row>
  __device__ __forceinline__ void put_pairs(const Row& row, const Fetch& at) {
    const int lane = lane_id() % 16 * 2;
#pragma unroll
    for (int k = kFirstState; k < N; k += 2) {
      const int second = k + 1 < N ? k + 1 : k;
      unsigned words[2][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[0][j] = __shfl_sync(kAll, static_cast<unsigned>(Fetch::word(raw[k], j % 2)), lane + j / 2);
        words[1][j] = __shfl_sync(kAll, static_cast<unsigned>(Fetch::word(raw[second], j % 2)), lane + j / 2);
        words[0][j] = lane_id() < 16 ? words[0][j] : words[1][j];
      }
      uint4* const to = pair_of(row, at, k);
      if (to) Fetch::store(to, uint4{words[0][0], words[0][1], words[0][2], words[0][3]});
    }
  }
};

// The N operands of the rule, of which Coded ones may be stored otherwise than plainly.
template <class Fetch, class T, int N, bool Coded>
struct Stored : Codes<Fetch, T, N, Coded> {
  using Base = Codes<Fetch, T, N, Coded>;
  using Base::kCount;
  using Base::kHasCodes;
  using Base::kHasPairs;
  using Base::kStates;
  using Base::raw;
  using Base::values;

  template <class Row>
  __device__ __forceinline__ void fetch(const Row& row, const Fetch& at) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (kHasPairs && k >= kFirstState && has_blocks(row.signature.codec(k))) continue;
      at.fetch(raw[k], row.address[k][0], row.signature.codec(k), k);
    }
    if constexpr (kHasPairs) {
      if (row.signature.has(kBlocks)) this->fetch_pairs(row, at);
    }
    if constexpr (Coded) {
      typename Fetch::Raw beside = {};
      if (row.signature.has(kPartner)) {
        at.fetch_behind(beside, row.address[kParam][1], partner_of(row), row.partner_column());
      }
      decode_param(row, beside);
    } else {
      decode<Fetch>(values[kParam], raw[kParam], row.signature.codec(kParam));
    }
    decode<Fetch>(values[kGrad], raw[kGrad], row.signature.codec(kGrad));
#pragma unroll
    for (int k = kFirstState; k < N; ++k) {
      if (kHasCodes && has_blocks(row.signature.codec(k))) {
        this->decode_codes(row, at, k);
      } else {
        decode<Fetch>(values[k], raw[k], as_plain(row.signature.codec(k)));
      }
    }
  }

  // step: from 0 on, of the words that round.
  template <class Row>
  __device__ __forceinline__ void put(const Row& row, const Fetch& at, std::uint32_t step,
                                      [[maybe_unused]] const Largest<kStates>& largest) {
    if constexpr (Coded) {
      put_param(row, at, step);
    } else {
      put_plain(row, at, kParam);
    }
#pragma unroll
    for (int k = kFirstState; k < N; ++k) {
      if (kHasCodes && has_blocks(row.signature.codec(k))) {
        this->put_codes(row, at, k, largest.of[k - kFirstState]);
      } else if (Coded && row.signature.codec(k) == Codec::stochastic) {
        put_rounded(row, at, k, step);
      } else {
        put_plain(row, at, k);
      }
    }
    if constexpr (kHasPairs) {
      if (row.signature.has(kBlocks)) this->put_pairs(row, at);
    }
  }

  // What a first pass over a block finds, instead of writing.
  __device__ __forceinline__ void measure(const Fetch& at, Largest<kStates>& largest) const {
#pragma unroll
    for (int k = kFirstState; k < N; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (at.is_active(i)) largest.add(k - kFirstState, static_cast<float>(values[k][i]));
      }
    }
  }

 private:
  template <class Row>
  static __device__ __forceinline__ Codec partner_of(const Row& row) {
    return row.signature.codec(kParam) == Codec::split ? Codec::bf16 : Codec::f32;
  }
  static __device__ __forceinline__ Codec as_plain(Codec codec) {
    return Coded && codec == Codec::stochastic ? Codec::bf16 : codec;
  }
  static __device__ __forceinline__ float whole(typename Fetch::Raw& raw, int i) {
    return __uint_as_float(static_cast<unsigned>(Fetch::word(raw, i)));
  }

  template <class Row>
  __device__ __forceinline__ void decode_param(const Row& row, typename Fetch::Raw& beside) {
    const Codec codec = row.signature.codec(kParam);
    if (codec == Codec::split) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[kParam][i] = joined(Fetch::half(raw[kParam], i), Fetch::half(beside, i));
      }
    } else if (row.signature.has(kPartner)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[kParam][i] = current_master(Fetch::half(raw[kParam], i), whole(beside, i), codec);
      }
    } else {
      decode<Fetch>(values[kParam], raw[kParam], as_plain(codec));
    }
  }

  template <class Row>
  __device__ __forceinline__ void put_param(const Row& row, const Fetch& at, std::uint32_t step) {
    const Codec codec = row.signature.codec(kParam);
    if (row.signature.has(kPartner)) {
      typename Fetch::Raw beside = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto value = static_cast<float>(values[kParam][i]);
        Fetch::set_half(raw[kParam], i, rounded_master(value, codec));
        if (codec == Codec::split) {
          Fetch::set_half(beside, i, missing(value));
        } else {
          Fetch::word(beside, i) = __float_as_uint(value);
        }
      }
      at.put(raw[kParam], row.address[kParam][0], Codec::bf16, kParam);
      at.put_behind(beside, row.address[kParam][1], partner_of(row), row.partner_column());
    } else if (codec == Codec::stochastic) {
      put_rounded(row, at, kParam, step);
    } else {
      put_plain(row, at, kParam);
    }
  }

  template <class Row>
  __device__ __forceinline__ void put_plain(const Row& row, const Fetch& at, int k) {
    encode<Fetch>(raw[k], values[k], row.signature.codec(k));
    at.put(raw[k], row.address[k][0], row.signature.codec(k), k);
  }

  template <class Row>
  __device__ __forceinline__ void put_rounded(const Row& row, const Fetch& at, int k, std::uint32_t step) {
    std::uint32_t words[kCount];
    rounding_words(words, row.draw(/*seed=*/0, step, k == kParam ? 1 : k), row, at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Fetch::set_half(raw[k], i, rounded_by(static_cast<float>(values[k][i]), words[i]));
    }
    at.put(raw[k], row.address[k][0], Codec::bf16, k);
  }
};

// The scales of a block that a warp has gone through, whose lanes do not read them any more.
template <class Row, int N>
__device__ __forceinline__ void put_scales(const Row& row, std::int64_t block, const Largest<N>& largest) {
  __syncwarp();
  if (lane_id() != 0) return;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Codec codec = row.signature.codec(kFirstState + k);
    if (has_blocks(codec)) global<float>(row.address[kFirstState + k][1])[block] = Scale(largest.of[k], codec).scale;
  }
}

}  // namespace fusedopt::cuda
