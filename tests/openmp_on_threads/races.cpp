// Runs the CPU engine on rows that come close to one another without touching, for ThreadSanitizer to watch, and
// compares the results of several threads with one thread's, bit for bit. With --plant, two rows touch, which
// ThreadSanitizer must report.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <string_view>
#include <vector>

#include "cpu/engine.h"
#include "cpu/registry.h"

namespace {

using namespace fusedopt;

using Bytes = std::vector<std::byte>;

constexpr int kThreads = 4;
constexpr double kUnclipped = std::numeric_limits<double>::infinity();

[[noreturn]] void fail(const char* what, std::int64_t tile = 0) {
  std::fprintf(stderr, "%s (tiles of %lld)\n", what, static_cast<long long>(tile));
  std::exit(1);
}

const Kernel& kernel(std::string_view rule, int n_states) {
  for (const Kernel& k : cpu::kernels()) {
    if (k.rule == rule && k.n_states == n_states) return k;
  }
  fail("a kernel is missing");
}

std::int64_t size_of(DType dtype) {
  constexpr std::int64_t sizes[] = {4, 8, 2, 2};  // in the order of DType
  return sizes[static_cast<int>(dtype)];
}

// Rows and their memory. Worlds made alike hold the same values.
class World {
 public:
  explicit World(bool plant) {
    constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
    const Kernel &sgd = kernel("sgd", 1), &adam = kernel("adam", 2), &amsgrad = kernel("adam", 3),
                 &lion = kernel("lion", 1);
    rows_.reserve(64);
    Row& first = dense(sgd, 9001, f32, f32, f32);
    Row& second = dense(sgd, 9001, f32, f32, f32);
    if (plant) second.data[kParam] = first.data[kParam];
    dense(adam, 5003, f64, f64, f64);
    dense(amsgrad, 2999, f16, f16, f32);
    dense(lion, 4097, f32, bf16, bf16);
    dense(adam, 1, f32, f32, f32);
    dense(lion, 700, f64, f32, f32).active = false;

    // Odd sizes, back to back: their ends share words, and the second's operands are not aligned to more than one.
    Row& left = dense(adam, 3001, bf16, bf16, bf16);
    Row& right = dense(adam, 1501, bf16, bf16, bf16);
    for (const int k : {kParam, kFirstState, kFirstState + 1}) {
      left.data[k] = fill(bf16, left.numel + right.numel);
      right.data[k] = static_cast<std::byte*>(left.data[k]) + left.numel * size_of(bf16);
    }

    // One in the gaps of the other.
    Row& even = dense(adam, 60 * 40, f32, f32, f32);
    Row& odd = dense(adam, 60 * 40, f32, f32, f32);
    for (const int k : {kParam, kFirstState, kFirstState + 1}) {
      std::byte* const both = fill(f32, 2 * even.numel);
      lay(even, k, both, 40, {80, 2});
      lay(odd, k, both + size_of(f32), 40, {80, 2});
    }
    lay(dense(sgd, 59 * 61, f32, f32, f32), kGrad, fill(f32, 59 * 61), 61, {1, 59});  // transposed
    lay(dense(amsgrad, 30 * 70, f16, f16, f16), kParam, fill(f16, 30 * 71), 70, {71, 1});
    cohorts_.resize(rows_.size());
  }

  // The tables for one step; `tile` is how many elements make an item.
  Job job(int threads, std::int64_t tile) {
    items_.clear();
    bundles_.clear();
    ++step_;
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      for (std::int64_t begin = 0; begin < rows_[r].numel; begin += tile) {
        // Some bundles have two items, as those of small tensors have.
        if (items_.size() % 5 != 1) bundles_.push_back(static_cast<std::int64_t>(items_.size()));
        const std::int64_t count = std::min(tile, rows_[r].numel - begin);
        items_.push_back({static_cast<std::int32_t>(r), static_cast<std::int32_t>(count), begin});
      }
      // Betas of Adam and Lion; as momentum, dampening and Nesterov's switch they serve SGD too.
      const double hyper[kMaxHyper] = {0.9, 0.99, 1e-8};
      double scalars[kMaxScalars] = {step_};
      rows_[r].cohort = static_cast<std::int32_t>(r);
      cohorts_[r] = {0.1, r % 2 ? 0.01 : 0.0, r % 2 ? 1.0 : 0.99, r % 3 ? 1.0 : -1.0, {}};
      rows_[r].kernel->prepare(hyper, scalars, step_ == 1, cohorts_[r].coefficients);
    }
    bundles_.push_back(static_cast<std::int64_t>(items_.size()));
    partials_.assign(bundles_.size(), 0);
    Job job{};
    job.rows = rows_.data();
    job.items = items_.data();
    job.bundles = bundles_.data();
    job.n_bundles = static_cast<std::int64_t>(bundles_.size()) - 1;
    job.cohorts = cohorts_.data();
    job.partials = partials_.data();
    job.threads = threads;
    job.measure = job.update = true;
    job.inverse_scale = 0.25;
    job.max_norm = kUnclipped;
    return job;
  }

  void spoil_a_gradient() { *static_cast<float*>(rows_.front().data[kGrad]) = std::nanf(""); }

  const std::deque<Bytes>& memory() const { return memory_; }

 private:
  Row& dense(const Kernel& kernel, std::int64_t numel, DType param, DType grad, DType state) {
    Row row{};
    row.numel = numel;
    row.kernel = &kernel;
    row.active = true;
    const DType compute = param == DType::f64 ? DType::f64 : DType::f32;
    row.in_place = true;
    for (int k = 0; k < kFirstState + kernel.n_states; ++k) {
      row.dtype[k] = k == kParam ? param : k == kGrad ? grad : state;
      row.data[k] = fill(row.dtype[k], numel);
      row.in_place &= row.dtype[k] == compute;
    }
    return rows_.emplace_back(row);
  }

  // Lays an operand out as a matrix with rows of `inner` elements.
  void lay(Row& row, int operand, std::byte* at, std::int64_t inner, std::array<std::int64_t, 2> strides) {
    Layout& layout = layouts_.emplace_back();
    layout.ndim = 2;
    layout.shape[0] = row.numel / inner;
    layout.shape[1] = inner;
    std::copy(strides.begin(), strides.end(), layout.stride);
    Layouts& table = tables_.emplace_back(row.layouts ? *row.layouts : Layouts{});
    table.operand[operand] = &layout;
    row.layouts = &table;
    row.data[operand] = at;
    row.in_place = false;
  }

  // Memory for elements between 0.1 and 1.9, which second moments can be as well.
  std::byte* fill(DType dtype, std::int64_t elements) {
    Bytes& bytes = memory_.emplace_back(static_cast<std::size_t>(elements * size_of(dtype)));
    for (std::int64_t i = 0; i < elements; ++i) {
      const double wide = 0.1 + static_cast<double>(++made_ * 7919 % 1801) / 1000;
      const float value = static_cast<float>(wide);
      const auto high = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
      const auto half = static_cast<_Float16>(value);
      const void* const from[] = {&value, &wide, &high, &half};  // in the order of DType
      std::memcpy(bytes.data() + i * size_of(dtype), from[static_cast<int>(dtype)],
                  static_cast<std::size_t>(size_of(dtype)));
    }
    return bytes.data();
  }

  std::deque<Bytes> memory_;
  std::deque<Layout> layouts_;
  std::deque<Layouts> tables_;
  std::vector<Row> rows_;
  std::vector<Cohort> cohorts_;
  std::vector<Item> items_;
  std::vector<std::int64_t> bundles_;
  std::vector<double> partials_;
  std::int64_t made_ = 0;
  double step_ = 0;
};

// Takes the same step in two worlds, one with one thread, and compares them.
template <class Change>
void step(World& alone, World& together, std::int64_t tile, bool skips, Change change) {
  const std::deque<Bytes> before = alone.memory();
  Job jobs[] = {alone.job(1, tile), together.job(kThreads, tile)};
  for (Job& job : jobs) {
    change(job);
    cpu::run(job);
  }
  if (jobs[0].n_bundles <= 2 * kThreads) fail("the job is too small for its threads", tile);
  if (jobs[0].skipped != skips || jobs[1].skipped != skips) fail("what to skip is decided otherwise", tile);
  if (std::memcmp(&jobs[0].squared_norm, &jobs[1].squared_norm, sizeof(double))) fail("the norms differ", tile);
  if (jobs[0].measure && jobs[0].squared_norm == 0) fail("nothing was measured", tile);
  if (alone.memory() != together.memory()) fail("the results differ", tile);
  if ((alone.memory() == before) != (skips || !jobs[0].update)) fail("a step was taken or not, unexpectedly", tile);
}

}  // namespace

int main(int argc, char** argv) {
  const bool plant = argc > 1 && std::string_view(argv[1]) == "--plant";
  // Items of less than one of the engine's stages, of one, and of more.
  for (const std::int64_t tile : {501, 1024, 2500}) {
    World alone(plant), together(plant);
    const auto take = [&](bool skips, auto change) { step(alone, together, tile, skips, change); };
    for (int i = 0; i < 3; ++i) take(false, [](Job& job) { job.max_norm = 1; });
    take(false, [](Job& job) { job.update = false; });
    take(false, [](Job& job) {
      job.measure = false;
      job.squared_norm = 400;
      job.max_norm = 2;
    });
    for (World* const world : {&alone, &together}) world->spoil_a_gradient();
    take(true, [](Job& job) { job.skip_nonfinite = true; });
  }
  std::puts("no difference");
  return 0;
}
