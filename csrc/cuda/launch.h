// The host's side of a launch: which kernel, how many blocks, and the arguments that stand.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda/registry.h"

namespace fusedopt::cuda {

// Why there is no GPU that this build can use; empty if there is one.
std::string no_device();

// Whether this build has code for a GPU.
bool has_code_for(int device);

// How many words of a live table a launch takes by value.
int words_by_value(int device);

// The kernel of a rule that steps the variants with these states, at both sizes of its arguments.
class Choice {
 public:
  Choice(const std::string& rule, const std::vector<std::vector<std::string>>& states);

  // How many blocks a device holds at once: what a launch has at most.
  int blocks(int device) const;

  const Entry& entry() const { return *entry_; }

 private:
  const Entry* entry_;
};

// What a kind of rows is: whether it has strides, its operands' types, and the names of its states.
struct KindNames {
  bool strided;
  std::vector<std::string> types;
  std::vector<std::string> states;
};

class Launcher {
 public:
  // tables: as it stands, without kinds and what changes from launch to launch.
  // words: of the live table.
  Launcher(const Choice& choice, const Tables& tables, const std::vector<KindNames>& kinds, int device, int blocks,
           int words);

  // words: the live table on the host, read before this returns, to send it by value; null to read it on the device.
  void run(const std::int64_t* words, std::uintptr_t stream, bool measure, bool update, std::uintptr_t grad_scale,
           std::uintptr_t found_inf);

 private:
  template <int Words>
  void launch(void (*kernel)(Arguments<Words>), const std::int64_t* words, std::uintptr_t stream) const;

  const Entry* entry_;
  Tables tables_;
  int device_, blocks_, words_;
};

}  // namespace fusedopt::cuda
