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

[[noreturn]] void fail(const char* what, std::int64_t size = 0) {
  std::fprintf(stderr, "%s (shares of %lld)\n", what, static_cast<long long>(size));
  std::exit(1);
}

const Kernel& kernel(std::string_view rule, std::size_t n_states) {
  for (const Kernel& k : cpu::kernels()) {
    if (k.names.rule == rule && k.names.states.size() == n_states) return k;
  }
  fail("a kernel is missing");
}

std::int64_t size_of(DType dtype) { return kDTypeSizes[static_cast<int>(dtype)]; }

// Rows and their memory. Worlds made alike hold the same values.
class World {
 public:
  // adds_up: all rows are of a rule that does, over tensors.
  World(bool plant, bool adds_up) : adds_up_(adds_up) {
    constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
    const auto plain = [&](const char* rule, std::size_t n_states) -> const Kernel& {
      return adds_up ? kernel("lamb", 2) : kernel(rule, n_states);
    };
    const Kernel &sgd = plain("sgd", 1), &adam = plain("adam", 2), &amsgrad = plain("adam", 3),
                 &lion = plain("lion", 1);
    rows_.reserve(64);
    Row& first = dense(sgd, 9001, f32, f32, f32);
    Row& second = dense(sgd, 9001, f32, f32, f32);
    if (plant) at(second, kParam) = at(first, kParam);
    dense(adam, 5003, f64, f64, f64);
    dense(amsgrad, 2999, f16, f16, f32);
    dense(lion, 4097, f32, bf16, bf16);
    dense(adam, 1, f32, f32, f32);
    dense(lion, 700, f64, f32, f32).active = false;

    // Odd sizes, back to back: their ends share words, and the second's operands are not aligned to more than one.
    Row& left = dense(adam, 3001, bf16, bf16, bf16);
    Row& right = dense(adam, 1501, bf16, bf16, bf16);
    for (const int k : {kParam, kFirstState, kFirstState + 1}) {
      at(left, k) = fill(bf16, left.numel + right.numel);
      at(right, k) = static_cast<std::byte*>(at(left, k)) + left.numel * size_of(bf16);
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

  // The tables for one step; `size` is how many elements make a share.
  Job job(int threads, std::int64_t size) {
    shares_.clear();
    coefficients_.clear();
    ++step_;
    std::int64_t room = 0;
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      for (std::int64_t begin = 0; begin < rows_[r].numel;) {
        if (!room) {
          shares_.push_back({static_cast<std::int32_t>(r), begin});
          room = size;
        }
        const std::int64_t count = std::min(room, rows_[r].numel - begin);
        begin += count;
        room -= count;
      }
      // Betas of Adam and Lion; as momentum, dampening and Nesterov's switch they serve SGD too. LAMB has two more.
      const double hyper[] = {0.9, 0.99, 1e-8, 0.01, 0};
      double scalars[] = {step_};
      const Kernel& kernel = *rows_[r].kernel;
      const std::size_t first = coefficients_.size();
      coefficients_.resize(first + kernel.names.coefficients.size());
      kernel.prepare(hyper, scalars, step_ == 1, coefficients_.data() + first);
      rows_[r].cohort = static_cast<std::int32_t>(r);
      cohorts_[r] = {0.1, 0.01, r % 3 ? 1.0 : -1.0, r % 2 == 0, r % 4 == 0, {}, first, 0};
    }
    shares_.push_back({static_cast<std::int32_t>(rows_.size()) - 1, rows_.back().numel});
    partials_.assign(shares_.size(), 0);
    Job job{};
    job.rows = rows_.data();
    job.n_rows = static_cast<std::int64_t>(rows_.size());
    job.shares = shares_.data();
    job.n_shares = static_cast<std::int64_t>(shares_.size()) - 1;
    job.cohorts = cohorts_.data();
    job.coefficients = coefficients_.data();
    job.partials = partials_.data();
    job.threads = threads;
    job.passes = kNormPass | kUpdatePass | (adds_up_ ? kSumsPass : 0);
    job.inverse_scale = 0.25;
    job.max_norm = kUnclipped;
    if (adds_up_) add_sums(job);
    return job;
  }

  void spoil_a_gradient() { *static_cast<float*>(at(rows_.front(), kGrad)) = std::nanf(""); }

  const std::deque<Bytes>& memory() const { return memory_; }

 private:
  void add_sums(Job& job) {
    row_sums_.clear();
    for (std::size_t r = 0, share = 0; r < rows_.size(); ++r) {
      while (shares_[share + 1].row < static_cast<std::int32_t>(r)) ++share;
      const auto row = static_cast<std::int64_t>(r);
      row_sums_.push_back({row, 1, rows_[r].numel, static_cast<std::int64_t>(share), row});
    }
    job.scalars = &step_;
    job.sums.rows = row_sums_.data();
    job.sums.n_measures = rows_.front().kernel->names.measures.size();
    slots_.assign((shares_.size() + rows_.size()) * job.sums.n_measures, 0);
    segments_.assign(rows_.size() * job.sums.n_measures, 0);
    job.sums.slots = slots_.data();
    job.sums.segments = segments_.data();
  }

  static void*& at(Row& row, int operand) { return row.addresses[operand]; }

  Row& dense(const Kernel& kernel, std::int64_t numel, DType param, DType grad, DType state) {
    Row row{};
    row.numel = numel;
    row.kernel = &kernel;
    row.active = true;
    std::vector<void*>& addresses = addresses_.emplace_back();
    std::vector<Codec>& codecs = codecs_.emplace_back();
    for (std::size_t k = 0; k < kFirstState + kernel.names.states.size(); ++k) {
      const DType dtype = k == kParam ? param : k == kGrad ? grad : state;
      addresses.push_back(fill(dtype, numel));
      codecs.push_back(plain(dtype));
    }
    row.addresses = addresses.data();
    row.codecs = codecs.data();
    return rows_.emplace_back(row);
  }

  // Lays an operand out as a matrix with rows of `inner` elements.
  void lay(Row& row, int operand, std::byte* address, std::int64_t inner, std::array<std::int64_t, 2> strides) {
    Layout& layout = layouts_.emplace_back();
    layout.ndim = 2;
    layout.shape[0] = row.numel / inner;
    layout.shape[1] = inner;
    std::copy(strides.begin(), strides.end(), layout.stride);
    std::vector<const Layout*>& table = tables_.emplace_back(kFirstState + row.kernel->names.states.size());
    if (row.layouts) std::copy_n(row.layouts, table.size(), table.begin());
    table[static_cast<std::size_t>(operand)] = &layout;
    row.layouts = table.data();
    at(row, operand) = address;
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
  std::deque<std::vector<const Layout*>> tables_;
  std::deque<std::vector<void*>> addresses_;
  std::deque<std::vector<Codec>> codecs_;
  std::vector<Row> rows_;
  std::vector<Cohort> cohorts_;
  std::vector<double> coefficients_;
  std::vector<Share> shares_;
  std::vector<double> partials_;
  bool adds_up_;
  std::vector<RowSums> row_sums_;
  std::vector<double> slots_, segments_;
  std::int64_t made_ = 0;
  double step_ = 0;
};

// Takes the same step in two worlds, one with one thread, and compares them.
template <class Change>
void step(World& alone, World& together, std::int64_t size, bool skips, Change change) {
  const std::deque<Bytes> before = alone.memory();
  Job jobs[] = {alone.job(1, size), together.job(kThreads, size)};
  for (Job& job : jobs) {
    change(job);
    cpu::run(job);
  }
  if (jobs[0].n_shares <= 2 * kThreads) fail("the job is too small for its threads", size);
  if (jobs[0].skipped != skips || jobs[1].skipped != skips) fail("what to skip is decided otherwise", size);
  if (std::memcmp(&jobs[0].squared_norm, &jobs[1].squared_norm, sizeof(double))) fail("the norms differ", size);
  if (jobs[0].passes & kNormPass && jobs[0].squared_norm == 0) fail("nothing was measured", size);
  if (alone.memory() != together.memory()) fail("the results differ", size);
  if ((alone.memory() == before) != (skips || !(jobs[0].passes & kUpdatePass)))
    fail("a step was taken or not, unexpectedly", size);
}

}  // namespace

int main(int argc, char** argv) {
  const bool plant = argc > 1 && std::string_view(argv[1]) == "--plant";
  // Shares of less than one of the engine's tiles, of one, and of more.
  for (const std::int64_t share : {501, 1024, 2500, -501, -1024}) {  // negative ones of rules that add up
    const std::int64_t size = std::abs(share);
    World alone(plant, share < 0), together(plant, share < 0);
    const auto take = [&](bool skips, auto change) { step(alone, together, size, skips, change); };
    for (int i = 0; i < 3; ++i) take(false, [](Job& job) { job.max_norm = 1; });
    take(false, [](Job& job) { job.passes &= ~kUpdatePass; });
    take(false, [](Job& job) {
      job.passes &= ~kNormPass;
      job.squared_norm = 400;
      job.max_norm = 2;
    });
    for (World* const world : {&alone, &together}) world->spoil_a_gradient();
    take(true, [](Job& job) { job.skip_nonfinite = true; });
  }
  std::puts("no difference");
  return 0;
}
