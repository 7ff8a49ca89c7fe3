#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace fusedopt::cuda {
namespace {

constexpr int kDriverWithLargeArguments = 12010;
constexpr int kComputeWithLargeArguments = 7;
constexpr std::size_t kSmallArguments = 4096;

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky must not be found by whoever looks next
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Makes a device the current one, and the one before current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

Codec codec_of(const std::string& name) {
  const auto* found = std::find(std::begin(kCodecNames), std::end(kCodecNames), name);
  if (found == std::end(kCodecNames)) throw std::invalid_argument("unknown codec " + name);
  return static_cast<Codec>(found - std::begin(kCodecNames));
}

bool has_states(const RuleNames& variant, const std::vector<std::string>& states) {
  return std::equal(states.begin(), states.end(), variant.states.begin(), variant.states.end());
}

}  // namespace

std::string no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("no device: ") + cudaGetErrorString(status);
  }
  return count ? "" : "no device";
}

bool has_code_for(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(entries().front().small));
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    return false;
  }
  check(status, "cudaFuncGetAttributes");
  return true;
}

int words_by_value(int device, bool has_options) {
  if (has_options) return kSmall;
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  const int compute = attribute(cudaDevAttrComputeCapabilityMajor, device);
  return driver >= kDriverWithLargeArguments && compute >= kComputeWithLargeArguments ? kLarge : kSmall;
}

KernelSelection::KernelSelection(const std::string& rule, const std::vector<std::vector<std::string>>& states)
    : entry_(nullptr) {
  for (const Entry& entry : entries()) {
    if (rule != entry.names().rule || (entry_ && entry_->variants.size() <= entry.variants.size())) continue;
    const bool has_all = std::all_of(states.begin(), states.end(), [&](const auto& wanted) {
      return std::any_of(entry.variants.begin(), entry.variants.end(),
                         [&](const RuleNames& variant) { return has_states(variant, wanted); });
    });
    if (has_all) entry_ = &entry;
  }
  if (!entry_) throw std::invalid_argument("rule " + rule + " has no kernel with these states");
}

int KernelSelection::blocks(int device, bool has_options) const {
  const DeviceGuard guard(device);
  const auto resident = [](auto* kernel) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), kThreads, 0),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
  };
  int least = resident(has_options ? entry_->optioned : entry_->small);
  if (words_by_value(device, has_options) == kLarge) least = std::min(least, resident(entry_->large));
  return least * attribute(cudaDevAttrMultiProcessorCount, device);
}

std::vector<std::uint32_t> KernelSelection::encode(const std::vector<SignatureNames>& signatures, int n_states) const {
  std::vector<std::uint32_t> words;
  for (const SignatureNames& names : signatures) {
    const auto variant = std::find_if(entry_->variants.begin(), entry_->variants.end(),
                                      [&](const RuleNames& v) { return has_states(v, names.states); });
    if (variant == entry_->variants.end()) {
      throw std::logic_error("the kernel of rule " + std::string(entry_->names().rule) + " has no such variant");
    }
    const std::size_t flags = words.size();
    words.resize(flags + 1 + static_cast<std::size_t>(codec_words(kFirstState + n_states)));
    words[flags] = static_cast<std::uint32_t>(variant - entry_->variants.begin()) * kVariant;
    if (names.is_strided) words[flags] |= kStrided;
    if (names.is_padded) words[flags] |= kPadded;
    if (names.draws) words[flags] |= kDraws | kIndexed;
    if (!names.average.empty()) words[flags] |= names.average == "ema" ? kEma : kSlow;
    for (std::size_t k = 0; k < names.codecs.size(); ++k) {
      const Codec codec = codec_of(names.codecs[k]);
      words[flags + 1 + k / kCodecsInWord] |= static_cast<std::uint32_t>(codec) << (kCodecBits * (k % kCodecsInWord));
      if (size_of(codec) == 2 || partner_size(codec) == 2) words[flags] |= kHalves;
      if (has_blocks(codec)) words[flags] |= kBlocks;
      if (partner_size(codec)) words[flags] |= kPartner;
      if (codec == Codec::stochastic) words[flags] |= kIndexed;
      if (codec == Codec::f64) words[flags] |= kWide;
    }
  }
  return words;
}

Launcher::Launcher(const KernelSelection& selection, const Tables& tables, int device, int blocks, int words)
    : entry_(&selection.entry()), tables_(tables), device_(device), blocks_(blocks), words_(words) {}

void Launcher::run(const std::int64_t* words, std::uintptr_t stream, int passes, std::uintptr_t grad_scale,
                   std::uintptr_t found_inf) {
  if (words && words_ > kLarge) throw std::invalid_argument("the step table is too long to go by value");
  const DeviceGuard guard(device_);
  tables_.grad_scale = reinterpret_cast<const float*>(grad_scale);
  tables_.found_inf = reinterpret_cast<const float*>(found_inf);
  if (goes_on(passes) && in_one_launch) {
    in_one_launch = launch(words, stream, passes);
    if (in_one_launch) return;
  }
  for (const int part : {int{kNormPass}, kSumsPass | kScopesPass, kUpdatePass | kEpiloguePass}) {
    if (passes & part) launch(words, stream, passes & part);
  }
}

// False where a cooperative launch does not fit on what the stream has of the device: a part of its processors, as in
// a green context or beside other processes.
bool Launcher::launch(const std::int64_t* words, std::uintptr_t stream, int passes) {
  tables_.passes = passes;
  const bool is_large = words && words_ > kSmall;
  if (is_large) return launch_with(entry_->large, words, stream);
  return launch_with(tables_.n_options ? entry_->optioned : entry_->small, words, stream);
}

template <int Words>
bool Launcher::launch_with(void (*kernel)(Arguments<Words>), const std::int64_t* words, std::uintptr_t stream) const {
  static_assert(sizeof(Arguments<kSmall>) <= kSmallArguments && sizeof(Arguments<kLarge>) <= 32764);
  Arguments<Words> arguments;
  arguments.tables = tables_;
  if (words) {
    arguments.tables.step_table = nullptr;
    std::memcpy(arguments.step_table, words, sizeof(std::int64_t) * static_cast<std::size_t>(words_));
  }
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = goes_on(tables_.passes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks_));
  config.blockDim = dim3(kThreads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    return false;
  }
  check(status, "cudaLaunchKernelEx");
  return true;
}

}  // namespace fusedopt::cuda
