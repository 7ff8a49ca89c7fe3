// The host's side of a launch: which kernel, how many blocks, and the arguments that stand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/registry.h"

namespace fusedopt::cuda {

// Why there is no GPU that this build can use; empty if there is one.
std::string no_device();

// Whether this build has code for a GPU.
bool has_code_for(int device);

// How many words of a step table a launch takes by value, of a kernel with options or without.
int words_by_value(int device, bool has_options);

// Names of what rows have in common: whether some operand is strided, their codecs, the rule's states that they have,
// the average, empty if there is none, whether their gradients get noise, and whether slices are padded.
struct SignatureNames {
  bool is_strided;
  std::vector<std::string> codecs;
  std::vector<std::string> states;
  std::string average;
  bool draws;
  bool is_padded;
};

// The kernel of a rule that steps the variants with these states, at both sizes of its arguments.
class KernelSelection {
 public:
  KernelSelection(const std::string& rule, const std::vector<std::vector<std::string>>& states);

  // How many blocks a device holds at once, of the kernel with options or without: what a launch has at most.
  int blocks(int device, bool has_options) const;

  // The words of signatures, as the kernel reads them, of rows with up to n_states states,
  // averages among them.
  std::vector<std::uint32_t> encode(const std::vector<SignatureNames>& signatures, int n_states) const;

  const Entry& entry() const { return *entry_; }

 private:
  const Entry* entry_;
};

class Launcher {
 public:
  // tables: as it stands, without what changes from launch to launch.
  // words: of the step table.
  Launcher(const KernelSelection& selection, const Tables& tables, int device, int blocks, int words);

  // words: the step table on the host, read before this returns, to send it by value; null to read it on the device.
  // passes: bits of Pass. They take one cooperative launch, or two or three where blocks cannot all be resident.
  void run(const std::int64_t* words, std::uintptr_t stream, int passes, std::uintptr_t grad_scale,
           std::uintptr_t found_inf);

  // All passes in one launch, where that can be had; it is forgotten when a launch shows that it cannot.
  bool in_one_launch = true;

 private:
  bool launch(const std::int64_t* words, std::uintptr_t stream, int passes);
  template <int Words>
  bool launch_with(void (*kernel)(Arguments<Words>), const std::int64_t* words, std::uintptr_t stream) const;

  const Entry* entry_;
  Tables tables_;
  int device_, blocks_, words_;
};

}  // namespace fusedopt::cuda
