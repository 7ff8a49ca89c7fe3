// Choices that only a GPU can make, with the measurement that made each, or "untested". A build of its own may set any
// of them, as -DFUSEDOPT_THREADS=256: `fusedopt bench tune` compares such builds.
#pragma once

#if !defined(FUSEDOPT_THREADS)
#define FUSEDOPT_THREADS 128
#endif
#if !defined(FUSEDOPT_RESIDENT_THREADS)
#define FUSEDOPT_RESIDENT_THREADS 0
#endif
#if !defined(FUSEDOPT_NORM_TILES)
#define FUSEDOPT_NORM_TILES 4
#endif
#if !defined(FUSEDOPT_MASKED_ELEMENTS)
#define FUSEDOPT_MASKED_ELEMENTS 4
#endif
#if !defined(FUSEDOPT_HALVES_IN_TWO)
#define FUSEDOPT_HALVES_IN_TWO 0
#endif
#if !defined(FUSEDOPT_STREAMING_STORES)
#define FUSEDOPT_STREAMING_STORES 0
#endif
#if !defined(FUSEDOPT_PREFETCH)
#define FUSEDOPT_PREFETCH 1
#endif
#if !defined(FUSEDOPT_EARLY_PREPARE)
#define FUSEDOPT_EARLY_PREPARE 1
#endif

namespace fusedopt::cuda {

// Of a block. Untested.
constexpr int kThreads = FUSEDOPT_THREADS;

// Threads on a processor that registers are left for; 0: as many as let nothing be spilled, by machine code of sm_90:
// 512 for rules with one state at most, 384 with more or with sums, and 256 where one kernel steps several variants or
// has options.
// Untested.
constexpr int kResidentThreads = FUSEDOPT_RESIDENT_THREADS;
constexpr int resident_blocks(int n_variants, int n_states, bool adds_up, bool has_options) {
  const int most = n_variants > 1 || has_options ? 256 : n_states > 1 || adds_up ? 384 : 512;
  const int threads = kResidentThreads ? kResidentThreads : most;
  return (threads + kThreads - 1) / kThreads;
}

// Whole tiles whose loads are under way at once in the norm: with one, a warp has 1 KiB under way, which by reading is
// half of what it takes. Untested.
constexpr int kNormTiles = FUSEDOPT_NORM_TILES;

// Elements of a lane whose loads are under way at once where tiles are not whole. Untested.
constexpr int kMaskedElements = FUSEDOPT_MASKED_ELEMENTS;

// Read and write 8 elements of 2 bytes in two halves, so that those of 4 bytes beside them are dense in each access of
// a warp. Untested.
constexpr bool kHalvesInTwo = FUSEDOPT_HALVES_IN_TWO;

// Store past the caches. Untested.
constexpr bool kStreamingStores = FUSEDOPT_STREAMING_STORES;

// Ask for a warp's first tile of a cohort while one thread prepares. Untested.
constexpr bool kPrefetch = FUSEDOPT_PREFETCH;

// Prepare the first cohort before it is known what becomes of the step. Where that takes a grid sync, between arriving
// and waiting: the other blocks have what they wait for, and this one would wait anyway. Untested.
constexpr bool kEarlyPrepare = FUSEDOPT_EARLY_PREPARE;

}  // namespace fusedopt::cuda
