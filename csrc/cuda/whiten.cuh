// Masked whitening on CUDA in two launches: partial sums per block, then every block reduces all
// partials in the same order and normalises. No atomics: bitwise reproducible.
//
// PivotedSums keep the fp64 dependency chain short: 16 operations per launch (two levels of a
// change of pivot and five additions), then 3 divisions and a square root for mean and scale.
// Merging moments would divide at every step.
#pragma once

#include "../common/moments.h"
#include "block_reduce.cuh"
#include "token_reader.cuh"

namespace rl {

constexpr int kWhitenThreads = 512;
constexpr int kWhitenWarps = kWhitenThreads / 32;
constexpr int kWhitenBlocks = 256;                // about two per SM
constexpr int kWhitenBatch = 4;                   // tiles in flight per warp
constexpr int64_t kMaxPartials = kWhitenThreads;  // one per thread of the second launch

namespace {

__device__ __forceinline__ int64_t first_tile() {
  return int64_t{blockIdx.x} * kWhitenWarps + threadIdx.x / 32;
}
// Number of warps of the launch: the stride between a warp's tiles.
__device__ __forceinline__ int64_t tile_step() { return int64_t{gridDim.x} * kWhitenWarps; }

// A warp's next complete tiles, read together.
template <typename A>
struct TileBatch {
  RawTile<A> raw[kWhitenBatch];
  uint32_t mask[kWhitenBatch];

  __device__ __forceinline__ void start(const TokenView& x_view, const TokenView& mask_view,
                                        int64_t whole, int64_t tile) {
#pragma unroll
    for (int k = 0; k < kWhitenBatch; ++k) {
      const int64_t mine = tile + k * tile_step();
      if (mine >= whole) continue;
      read_vectors(x_view.data + mine * (kTile * sizeof(A)), raw[k]);
      if (mask_view.data)
        mask[k] = read_as<uint32_t>(mask_view.data + mine * kTile + lane_id() * kPerLane);
    }
  }
};

// Calls body(whole, first, count, x, keep) for the warp's tiles in order: whether the tile is read
// as vectors (bool constant), its first token, its number of tokens, the lane's tokens, and their
// mask bits. Calls between() once, after the first reads are issued.
template <typename A, typename Between, typename Body>
__device__ __forceinline__ void for_each_tile(const TokenView& x_view, const TokenView& mask_view,
                                              const Tiles& tiles, A* stage, const Between& between,
                                              const Body& body) {
  int64_t tile = first_tile();
  A x[kPerLane];
  bool first = true;
#pragma unroll 1
  do {
    TileBatch<A> batch;
    batch.start(x_view, mask_view, tiles.whole, tile);
    if (first) between();
    first = false;
#pragma unroll
    for (int k = 0; k < kWhitenBatch; ++k, tile += tile_step()) {
      if (tile >= tiles.whole) continue;
      as_numbers(batch.raw[k], x);
      body(std::true_type{}, tile * kTile, kTile, x,
           unpack_mask(mask_view, batch.mask[k], kTile, true));
    }
  } while (tile < tiles.whole);
  while (tile >= tiles.whole + tile_step()) tile -= tile_step();
#pragma unroll 1
  for (; tile < tiles.count(); tile += tile_step()) {
    const Place place = tiles.at(tile);
    if (tiles.in_one_row(place)) {
      RawTile<A> raw;
      const bool as_vectors = fetch(x_view, place, raw);
      unpack(x_view, raw, as_vectors, stage, x);
    } else {
      read_across(x_view, tiles, tile, stage, x);
    }
    const unsigned keep = read_mask(mask_view, tiles, place);
    body(std::false_type{}, tile * kTile, place.count, x, keep);
  }
}

template <typename A>
__global__ void __launch_bounds__(kWhitenThreads, std::is_same_v<A, double> ? 1 : 2)
    whiten_sums_kernel(TokenView x_view, TokenView mask_view, Tiles tiles,
                       PivotedSums* __restrict__ partials_ptr) {
  __shared__ alignas(16) A stages[kWhitenWarps][kTile];
  PivotedValues<A, double> values;
  for_each_tile(
      x_view, mask_view, tiles, stages[threadIdx.x / 32], [] {},
      [&](auto, int64_t, int, const A(&x)[kPerLane], unsigned keep) { values.add(x, keep); });
  const PivotedSums all = block_total(values.sums());
  if (threadIdx.x == 0) partials_ptr[blockIdx.x] = all;
}

// x_view may view out: a warp reads each of its tiles before it writes it.
template <typename A>
__global__ void __launch_bounds__(kWhitenThreads, std::is_same_v<A, double> ? 1 : 2)
    whiten_kernel(TokenView x_view, TokenView mask_view, Tiles tiles,
                  const PivotedSums* __restrict__ partials_ptr, int partials, bool shift_mean,
                  bool unbiased, A* out_ptr) {
  __shared__ alignas(16) A stages[kWhitenWarps][kTile];
  A* const stage = stages[threadIdx.x / 32];
  Whitening<A> whitening;
  for_each_tile(
      x_view, mask_view, tiles, stage,
      [&] {
        const int mine = static_cast<int>(threadIdx.x);
        const PivotedSums all = block_total(mine < partials ? partials_ptr[mine] : PivotedSums{});
        if (mine == 0) whitening = Whitening<A>(all.moments(), shift_mean, unbiased);
        whitening = from_first_thread(whitening);
      },
      [&](auto whole, int64_t first, int count, A(&x)[kPerLane], unsigned keep) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j)
          x[j] = keep >> j & 1u ? whitened(x[j], whitening.mean, whitening.scale, whitening.shift)
                                : A(0);
        if constexpr (decltype(whole)::value) {
          write_vectors(out_ptr + first, x);
        } else {
          write_tile(out_ptr + first, count, stage, x);
        }
      });
}

}  // namespace

// ---- host -------------------------------------------------------------------------------------

inline unsigned whiten_blocks(const Tiles& tiles) {
  return blocks_for(tiles.count(), kWhitenWarps, kWhitenBlocks);
}

inline Tensor new_partials(const Tensor& like, int64_t count) {
  constexpr int64_t kWords = sizeof(PivotedSums) / sizeof(double);
  return empty_like_device(like, {count, kWords}, ScalarType::Double);
}

// Runs the second launch.
template <typename A>
void whiten_from(const char* op, const TokenView& x, const TokenView& mask, const Tiles& tiles,
                 const Tensor& partials, bool shift_mean, bool unbiased, A* out,
                 cudaStream_t stream) {
  launch(op, whiten_kernel<A>, whiten_blocks(tiles), kWhitenThreads, 0, stream, x, mask, tiles,
         static_cast<const PivotedSums*>(partials.const_data_ptr()),
         static_cast<int>(partials.size(0)), shift_mean, unbiased, out);
}

}  // namespace rl
