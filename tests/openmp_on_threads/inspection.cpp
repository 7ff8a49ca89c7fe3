// Lets a team of threads look at tensors through an ABI of this file, for ThreadSanitizer to watch. Asking for a
// writable address of a lazy storage gives the storage memory of its own, as torch does it; with --plant two tensors
// have one such storage, which ThreadSanitizer must report.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <vector>

#include "host/abi.h"

namespace {

using namespace fusedopt::host;

constexpr int kThreads = 4;
constexpr std::int64_t kCount = 3000;

struct Storage {
  std::array<float, 6> memory;
  void* address = memory.data();
  bool is_lazy = false;
};

const void* const kClass = "a class";

struct Tensor {
  const void* first_word = nullptr;  // at::Tensor's only one
  Storage* storage;
  std::int64_t shape[2] = {2, 3}, strides[2] = {3, 1};
  bool is_negated = false;
};

// A Python tensor, whose handle is after PyObject_HEAD.
struct Object {
  const void* type = kClass;
  Tensor tensor;
};

template <class T>
Abi::Status tell(T* out, T value) {
  *out = value;
  return 0;
}

Tensor& at(Abi::Handle handle) { return *static_cast<Tensor*>(handle); }

const Abi kAbi{
    [](Abi::Handle, std::int32_t* out) { return tell(out, 0); },
    [](Abi::Handle, std::int64_t* out) { return tell(out, std::int64_t{2}); },
    [](Abi::Handle t, std::int64_t** out) { return tell(out, at(t).shape); },
    [](Abi::Handle t, std::int64_t** out) { return tell(out, at(t).strides); },
    [](Abi::Handle, std::int32_t* out) { return tell(out, 6); },
    [](Abi::Handle, std::int32_t* out) { return tell(out, 0); },
    [](Abi::Handle, std::int32_t* out) { return tell(out, -1); },
    [](Abi::Handle, std::int64_t* out) { return tell(out, std::int64_t{24}); },
    [](Abi::Handle, std::int64_t* out) { return tell(out, std::int64_t{0}); },
    [](Abi::Handle t, const void** out) { return tell(out, const_cast<const void*>(at(t).storage->address)); },
    [](Abi::Handle t, void** out) {
      Storage& storage = *at(t).storage;
      if (storage.is_lazy) {
        storage.memory[0] += 1;  // in place of a copy
        storage.is_lazy = false;
      }
      return tell(out, storage.address);
    },
    [](Abi::Handle, bool* out) { return tell(out, false); },
    [](Abi::Handle) { return false; },
    [](Abi::Handle t) { return at(t).is_negated; },
    [](const void*) { return Abi::Handle{}; },
    [] { return false; },
    nullptr,
    0,
    0,
};

struct World {
  std::vector<Storage> storages = std::vector<Storage>(2 * kCount);
  std::vector<Object> tensors, gradients;
  std::vector<Expectation> expectations;
  std::vector<GradientExpectation> like;
  std::vector<Abi::Handle> handles;
  std::vector<const void*> addresses = std::vector<const void*>(kCount);
  std::int64_t dims[4] = {2, 3, 3, 1};
  WrittenMemory written;

  World() {
    for (Storage& storage : storages) {
      storage.address = storage.memory.data();
      storage.is_lazy = true;
    }
    for (std::int64_t i = 0; i < kCount; ++i) {
      tensors.push_back({kClass, {nullptr, &storages[static_cast<std::size_t>(i)]}});
      gradients.push_back({kClass, {nullptr, &storages[static_cast<std::size_t>(kCount + i)]}});
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      expectations.push_back(
          {&tensors[i].tensor, tensors[i].tensor.storage->address, 24, 0, 6, 0, -1, 2, false, kClass});
      like.push_back({nullptr, 0, 24, 0, 2, 6, 0, -1, 2, 4});
    }
  }

  // The gradients are found while others look at the tensors.
  bool look(int threads) {
    handles.assign(kCount, nullptr);
    const auto fetch = [this] {
      for (std::size_t i = 0; i < handles.size(); ++i) handles[i] = i % 7 ? &gradients[i].tensor : nullptr;
      return true;
    };
    return inspect(
        {kAbi, expectations.data(), kCount, like.data(), handles.data(), addresses.data(), kCount, dims, written},
        threads, fetch);
  }
};

int fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  World world;
  if (argc > 1 && std::string_view(argv[1]) == "--plant") {
    // Neighbours of different blocks, so that two threads take them at the same time.
    for (std::size_t i = 0; i + 128 < world.tensors.size(); ++i) {
      world.tensors[i + 128].tensor.storage = world.tensors[i % 128].tensor.storage;
      world.expectations[i + 128].address = world.expectations[i % 128].address;
    }
  }
  if (!world.look(kThreads)) return fail("something is said to have changed");
  for (std::size_t i = 0; i < world.addresses.size(); ++i) {
    const void* const is = i % 7 ? world.gradients[i].tensor.storage->address : nullptr;
    if (world.addresses[i] != is) return fail("a gradient's address is another");
  }
  world.gradients[1].tensor.strides[0] = 1;
  if (!world.look(kThreads) || world.addresses[1]) return fail("a gradient's strides were not looked at");
  world.tensors[2500].tensor.is_negated = true;
  if (world.look(kThreads) || world.look(1)) return fail("a lazy bit was not looked at");
  world.tensors[2500].tensor.is_negated = false;
  world.tensors[10].type = nullptr;
  if (world.look(kThreads) || world.look(1)) return fail("a class was not looked at");
  std::puts("no difference");
  return 0;
}
