// Stands in for CUDA's header in tests, so that the kernels' own source runs where there is no GPU: a block is a
// host thread, and its CUDA threads take turns in it, switching where they wait for one another.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Reads what a GPU would only ask for, so that a tool that watches memory sees where that is.
#define FUSEDOPT_SQRT(x) std::sqrt(x)
#define FUSEDOPT_PREFETCH_LINE(address) static_cast<void>(*reinterpret_cast<const volatile char*>(address))

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_threads {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 256 * 1024;

struct Grid {
  dim3 blocks, threads;
  std::barrier<> meeting;
};

// Waits until all of a group have come; whoever comes last opens it for the next time.
struct Gate {
  int size, arrived = 0;
  unsigned round = 0;
};

struct Block {
  struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };
  Grid& grid;
  dim3 index;
  void (*body)(void*);
  void* argument;
  std::vector<Lane> lanes;
  std::vector<Gate> warps;
  Gate all;
  std::vector<std::uint64_t> values[2];  // that lanes show one another, in turns
  std::map<const void*, std::vector<std::uint64_t>> shared;
  ucontext_t scheduler;
  unsigned current = 0;
  std::optional<std::barrier<>::arrival_token> arrival;  // at the grid's meeting
};

inline thread_local Block* block = nullptr;

// Whether blocks are held up where they count, so that they claim what there is to do in any order, and warps of a
// block at any place where they wait, so that one comes far ahead of another that it should have waited for.
inline bool disorder = false;
extern "C" __attribute__((visibility("default"), used)) inline void set_disorder(bool on) { disorder = on; }

inline void yield() { swapcontext(&block->lanes[block->current].context, &block->scheduler); }

inline void wait(Gate& gate) {
  const unsigned round = gate.round;
  if (++gate.arrived == gate.size) {
    gate.arrived = 0;
    ++gate.round;
    return;
  }
  while (gate.round == round) yield();
}

inline Gate& my_warp() { return block->warps[block->current / kWarp]; }

// What every lane of the warp shows. A lane that runs ahead shows its next value in the other half.
template <class T>
const std::uint64_t* show(T value) {
  static_assert(sizeof(T) <= 8);
  auto& shown = block->values[my_warp().round % 2];
  std::memcpy(&shown[block->current], &value, sizeof(T));
  wait(my_warp());
  return &shown[block->current / kWarp * kWarp];
}

inline unsigned arrive_at_grid() {
  wait(block->all);
  if (block->current == 0) block->arrival = block->grid.meeting.arrive();
  return 0;
}
inline void wait_for_grid() {
  if (block->current == 0) block->grid.meeting.wait(std::move(*block->arrival));
  wait(block->all);
}

template <class T>
T& shared(const void* key) {
  auto& memory = block->shared[key];
  if (memory.empty()) memory.assign((sizeof(T) + 7) / 8, 0xcdcdcdcdcdcdcdcdull);
  return *reinterpret_cast<T*>(memory.data());
}

inline void enter_lane() {
  block->body(block->argument);
  block->lanes[block->current].done = true;
  yield();
}

inline void run_block(Block& b) {
  block = &b;
  blockIdx = b.index;
  blockDim = b.grid.threads;
  gridDim = b.grid.blocks;
  const unsigned n = b.grid.threads.x;
  b.lanes.resize(n);
  b.warps.assign(n / kWarp, {kWarp});
  b.all.size = static_cast<int>(n);
  for (auto& half : b.values) half.resize(n);
  for (auto& lane : b.lanes) {
    lane.stack.reset(new char[kStack]);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    makecontext(&lane.context, enter_lane, 0);
  }
  bool is_held_up = false;
  for (unsigned left = n; left;) {
    left = 0;
    for (b.current = 0; b.current < n; ++b.current) {
      if (b.current % kWarp == 0) is_held_up = disorder && std::rand() % 8 != 0;
      if (b.lanes[b.current].done) continue;
      if (is_held_up) {
        ++left;
        continue;
      }
      threadIdx.x = b.current;
      swapcontext(&b.scheduler, &b.lanes[b.current].context);
      left += !b.lanes[b.current].done;
    }
  }
  block = nullptr;
}

inline void launch(dim3 blocks, dim3 threads, void (*body)(void*), void* argument) {
  Grid grid{blocks, threads, std::barrier<>(blocks.x)};
  std::vector<std::thread> team;
  for (unsigned i = 0; i < blocks.x; ++i) {
    team.emplace_back([&, i] {
      Block b{grid, {i, 0, 0}, body, argument, {}, {}, {}, {}, {}, {}, 0, {}};
      run_block(b);
    });
  }
  for (auto& t : team) t.join();
}

}  // namespace on_threads

#define FUSEDOPT_SHARED(Type, name)    \
  static const char key_of_##name = 0; \
  Type& name = on_threads::shared<Type>(&key_of_##name)

inline void __syncthreads() { on_threads::wait(on_threads::block->all); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline unsigned __ballot_sync(unsigned, bool value) {
  const std::uint64_t* all = on_threads::show(static_cast<std::uint64_t>(value));
  unsigned bits = 0;
  for (int k = 0; k < on_threads::kWarp; ++k) bits |= static_cast<unsigned>(all[k] & 1) << k;
  return bits;
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const std::uint64_t* all = on_threads::show(value);
  const unsigned lane = on_threads::block->current % on_threads::kWarp, from = lane + static_cast<unsigned>(offset);
  T result;
  std::memcpy(&result, &all[from < on_threads::kWarp ? from : lane], sizeof(T));
  return result;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  const std::uint64_t* all = on_threads::show(value);
  T result;
  std::memcpy(&result, &all[lane], sizeof(T));
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(on_threads::block->current % on_threads::kWarp) ^ bits);
}
inline void __syncwarp() { on_threads::show(std::uint64_t{0}); }

inline int __ffs(int bits) { return std::countr_zero(static_cast<unsigned>(bits)) + (bits != 0); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int atomicAdd(int* place, int value) {
  if (on_threads::disorder) std::this_thread::sleep_for(std::chrono::microseconds(std::rand() % 200));
  return std::atomic_ref<int>(*place).fetch_add(value);
}
inline int atomicMax(int* place, int value) {
  const int before = *place;
  *place = std::max(before, value);  // only of shared memory: a block is one host thread
  return before;
}

template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline void* __cvta_global_to_generic(std::size_t address) { return reinterpret_cast<void*>(address); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline double __drcp_rn(double x) { return 1 / x; }
using std::max;
using std::min;
using std::sqrt;

// ------------------------------------------------------------------------------------------ the host's calls

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorLaunchFailure,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorCooperativeLaunchTooLarge
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
struct cudaFuncAttributes {};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// What the next launch, or the next cooperative one, returns instead of running; for tests of error paths.
inline cudaError_t next_launch = cudaSuccess, next_cooperative_launch = cudaSuccess;
extern "C" __attribute__((visibility("default"), used)) inline void fail_next_launch() {
  next_launch = cudaErrorLaunchFailure;
}
extern "C" __attribute__((visibility("default"), used)) inline void refuse_next_cooperative_launch() {
  next_cooperative_launch = cudaErrorCooperativeLaunchTooLarge;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "unspecified launch failure" : "invalid argument";
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : 9;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, std::size_t) {
  return *blocks = 1, cudaSuccess;
}

template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), Arguments& arguments) {
  if (next_launch != cudaSuccess) return std::exchange(next_launch, cudaSuccess);
  if (config->attrs->val.cooperative && next_cooperative_launch != cudaSuccess) {
    return std::exchange(next_cooperative_launch, cudaSuccess);
  }
  struct Call {
    void (*kernel)(Arguments);
    Arguments& arguments;
  } call{kernel, arguments};
  on_threads::launch(
      config->gridDim, config->blockDim,
      [](void* argument) {
        auto& call = *static_cast<Call*>(argument);
        call.kernel(call.arguments);
      },
      &call);
  return cudaSuccess;
}
