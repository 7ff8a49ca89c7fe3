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

// An element type; of a complex tensor, its parts'.
enum class DType : std::uint8_t { f32, f64, bf16, f16 };
constexpr int kDTypes = 4;
constexpr std::string_view kDTypeNames[kDTypes] = {"fp32", "fp64", "bf16", "fp16"};
constexpr int kDTypeSizes[kDTypes] = {4, 8, 2, 2};

// How an operand's elements are stored. Plain ones are a DType each, in its order, at one address. Others have up to
// kAddresses, and may hold blocks of up to 256 elements, which lie inside slices of dimension 0.
enum class Codec : std::uint8_t { f32, f64, bf16, f16 };
constexpr int kAddresses = 2;

constexpr Codec plain(DType dtype) { return static_cast<Codec>(dtype); }

}  // namespace fusedopt
