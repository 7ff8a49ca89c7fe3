// What g++ calls for OpenMP, on threads whose every synchronisation ThreadSanitizer sees, unlike libgomp's.
// Only the guarantees of OpenMP synchronise: forks, joins and barriers, and those of nothing else.
//
// Dynamic loops and `single` are dealt out in turn. Each deal is one that OpenMP allows, neighbouring chunks
// always go to different threads, and no counter orders threads that OpenMP does not order.
#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

namespace {

constexpr unsigned kDefaultThreads = 4;

struct Team {
  explicit Team(unsigned size, unsigned turn) : size(size), turn(turn), barrier(size) {}
  unsigned size;
  unsigned turn;  // shifts all deals, so that regions differ in who does what
  std::barrier<> barrier;
};

struct Member {
  Team* team = nullptr;
  unsigned number = 0;
  unsigned constructs = 0;  // loops and singles that were met, the same in all of a team
  long next = 0, step = 0, chunk = 0, end = 0;

  unsigned deal() {
    const unsigned shift = team->turn + constructs++;
    return (number + shift) % team->size;
  }
};

thread_local Member self;

void run_as(const Member& member, void (*body)(void*), void* data) {
  const Member outer = self;
  self = member;
  body(data);
  self = outer;
}

bool take_chunk(long* begin, long* end) {
  if (self.step > 0 ? self.next >= self.end : self.next <= self.end) return false;
  *begin = self.next;
  *end = self.next + self.chunk;
  if (self.step > 0 ? *end > self.end : *end < self.end) *end = self.end;
  self.next += self.chunk * static_cast<long>(self.team->size);
  return true;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  static std::atomic<unsigned> turn{0};
  Team team(threads ? threads : kDefaultThreads, turn.fetch_add(1, std::memory_order_relaxed));
  std::vector<std::jthread> others;
  for (unsigned number = 1; number < team.size; ++number) {
    others.emplace_back([&team, body, data, number] { run_as({&team, number}, body, data); });
  }
  run_as({&team, 0}, body, data);
}

void GOMP_barrier() { self.team->barrier.arrive_and_wait(); }

bool GOMP_single_start() { return self.deal() == 0; }

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* chunk_begin,
                                          long* chunk_end) {
  self.step = step;
  self.chunk = chunk * step;
  self.next = start + self.chunk * static_cast<long>(self.deal());
  self.end = end;
  return take_chunk(chunk_begin, chunk_end);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* chunk_begin, long* chunk_end) {
  return take_chunk(chunk_begin, chunk_end);
}

void GOMP_loop_end() { GOMP_barrier(); }

void GOMP_loop_end_nowait() {}

int omp_get_thread_num() { return static_cast<int>(self.number); }

int omp_get_num_threads() { return self.team ? static_cast<int>(self.team->size) : 1; }
}
