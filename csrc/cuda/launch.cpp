#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
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
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

DType type_of(const std::string& name) {
  if (name == "fp32") return DType::f32;
  if (name == "fp64") return DType::f64;
  if (name == "bf16") return DType::bf16;
  if (name == "fp16") return DType::f16;
  throw std::invalid_argument("unknown element type " + name);
}

bool has_states(const Variant& variant, const std::vector<std::string>& states) {
  return variant.n_states == static_cast<int>(states.size()) &&
         std::equal(states.begin(), states.end(), variant.states);
}

Kind encode(const Entry& entry, const KindNames& names) {
  std::uint32_t bits = 0;
  bool halves = false, wide = false;
  for (std::size_t k = 0; k < names.types.size(); ++k) {
    const DType type = type_of(names.types[k]);
    bits |= static_cast<std::uint32_t>(type) << (2 * k);
    halves |= type == DType::bf16 || type == DType::f16;
    wide |= type == DType::f64;
  }
  for (std::size_t v = 0; v < entry.variants.size(); ++v) {
    if (!has_states(entry.variants[v], names.states)) continue;
    bits |= static_cast<std::uint32_t>(names.states.size()) << Kind::kStates;
    bits |= static_cast<std::uint32_t>(v) << Kind::kVariant;
    bits |= static_cast<std::uint32_t>(names.strided) << Kind::kStrided;
    bits |= static_cast<std::uint32_t>(halves) << Kind::kHalves;
    bits |= static_cast<std::uint32_t>(wide) << Kind::kWide;
    return {bits};
  }
  throw std::logic_error(std::string("the kernel of rule ") + entry.rule + " has no variant with these states");
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
  const Current current(device);
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

int words_by_value(int device) {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  const int compute = attribute(cudaDevAttrComputeCapabilityMajor, device);
  return driver >= kDriverWithLargeArguments && compute >= kComputeWithLargeArguments ? kLarge : kSmall;
}

Choice::Choice(const std::string& rule, const std::vector<std::vector<std::string>>& states) : entry_(nullptr) {
  for (const Entry& entry : entries()) {
    if (rule != entry.rule || (entry_ && entry_->variants.size() <= entry.variants.size())) continue;
    const bool has_all = std::all_of(states.begin(), states.end(), [&](const auto& wanted) {
      return std::any_of(entry.variants.begin(), entry.variants.end(),
                         [&](const Variant& variant) { return has_states(variant, wanted); });
    });
    if (has_all) entry_ = &entry;
  }
  if (!entry_) throw std::invalid_argument("rule " + rule + " has no kernel with these states");
}

int Choice::blocks(int device) const {
  const Current current(device);
  const auto resident = [](auto* kernel) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), kThreads, 0),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
  };
  int least = resident(entry_->small);
  if (words_by_value(device) == kLarge) least = std::min(least, resident(entry_->large));
  return least * attribute(cudaDevAttrMultiProcessorCount, device);
}

Launcher::Launcher(const Choice& choice, const Tables& tables, const std::vector<KindNames>& kinds, int device,
                   int blocks, int words)
    : entry_(&choice.entry()), tables_(tables), device_(device), blocks_(blocks), words_(words) {
  if (kinds.size() > kMaxKinds) {
    throw std::invalid_argument("parameters of more than " + std::to_string(kMaxKinds) +
                                " combinations of types, strides and states in one optimizer");
  }
  for (std::size_t k = 0; k < kinds.size(); ++k) tables_.kinds[k] = encode(*entry_, kinds[k]);
}

void Launcher::run(const std::int64_t* words, std::uintptr_t stream, bool measure, bool update,
                   std::uintptr_t grad_scale, std::uintptr_t found_inf) {
  if (words && words_ > kLarge) throw std::invalid_argument("the live table is too long to go by value");
  const Current current(device_);
  tables_.measure = measure;
  tables_.update = update;
  tables_.grad_scale = reinterpret_cast<const float*>(grad_scale);
  tables_.found_inf = reinterpret_cast<const float*>(found_inf);
  if (words && words_ > kSmall) {
    launch<kLarge>(entry_->large, words, stream);
  } else {
    launch<kSmall>(entry_->small, words, stream);
  }
}

template <int Words>
void Launcher::launch(void (*kernel)(Arguments<Words>), const std::int64_t* words, std::uintptr_t stream) const {
  static_assert(sizeof(Arguments<kSmall>) <= kSmallArguments && sizeof(Arguments<kLarge>) <= 32764);
  Arguments<Words> arguments;
  arguments.tables = tables_;
  if (words) {
    arguments.tables.live = nullptr;
    std::memcpy(arguments.live, words, sizeof(std::int64_t) * static_cast<std::size_t>(words_));
  }
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = tables_.measure && tables_.update;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks_));
  config.blockDim = dim3(kThreads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "cudaLaunchKernelEx");
}

}  // namespace fusedopt::cuda
