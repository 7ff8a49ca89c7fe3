// Operands of a step, and how they are stored.
#pragma once

#include <cstdint>
#include <string_view>

namespace fusedopt {

// Roles, in the order of a row: the parameter, its gradient, then the rule's states.
constexpr int kParam = 0;
constexpr int kGrad = 1;
constexpr int kFirstState = 2;

// Operands of a rule's row.
template <class Rule>
constexpr int kOperands = kFirstState + static_cast<int>(Rule::states.size());

// An element type; of a complex tensor, its parts'. Bytes are codes of something else.
enum class DType : std::uint8_t { f32, f64, bf16, f16, u8 };
constexpr int kDTypeSizes[] = {4, 8, 2, 2, 1};

// How an operand's elements are stored, see fusedopt/codecs.py. Plain ones are a DType each, in its order, at one
// address. Others have up to kAddresses, and may hold blocks of kBlockElements, which lie inside slices of dimension 0.
enum class Codec : std::uint8_t {
  f32,
  f64,
  bf16,
  f16,
  stochastic,
  split,
  master_bf16,
  master_f16,
  q8_signed,
  q8_unsigned
};
constexpr std::string_view kCodecNames[] = {"fp32",  "fp64",        "bf16",        "fp16",      "stochastic",
                                            "split", "master_bf16", "master_fp16", "q8_signed", "q8_unsigned"};
constexpr int kAddresses = 2;
constexpr std::int64_t kBlockElements = 256;

constexpr Codec plain(DType dtype) { return static_cast<Codec>(dtype); }
constexpr bool is_plain(Codec codec) { return codec <= Codec::f16; }
constexpr bool has_blocks(Codec codec) { return codec == Codec::q8_signed || codec == Codec::q8_unsigned; }
// Bytes of an element at each address; of scales, which several have, 0.
constexpr int size_of(Codec codec) {
  return codec == Codec::f32 ? 4 : codec == Codec::f64 ? 8 : has_blocks(codec) ? 1 : 2;
}
constexpr int partner_size(Codec codec) {
  return codec == Codec::split ? 2 : codec == Codec::master_bf16 || codec == Codec::master_f16 ? 4 : 0;
}
// The largest magnitude of a code.
constexpr float levels(Codec codec) { return codec == Codec::q8_signed ? 127.0f : 255.0f; }

}  // namespace fusedopt
