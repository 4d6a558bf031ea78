// Masked whitening on CUDA in two launches: moments of each block, then each block merges them all
// in the same order and normalises. No atomics: the same bits every time.
//
// x: rows of `width` tokens, read in tiles of 128 (see token_tiles.cuh).
#pragma once

#include "token_tiles.cuh"

namespace rl {

// Moments are left by at most this many blocks, so that every block of the second launch can merge
// them.
constexpr int64_t kMaxPartials = 512;
constexpr int kWhitenWarps = 16;

// Running sums of one thread about its first value. A pivot from among the values keeps the digits
// of the variance, wherever the mean lies.
template <typename A>
struct Spread {
  A pivot;
  double sum, squares;
  int count;  // a thread meets fewer than 2^31 tokens

  __device__ __forceinline__ static Spread none() { return {A(0), 0.0, 0.0, 0}; }
  __device__ __forceinline__ void add(A x) {
    if (count == 0) pivot = x;
    const double d = static_cast<double>(x) - static_cast<double>(pivot);
    sum += d;
    squares += d * d;
    ++count;
  }
  __device__ __forceinline__ Moments moments() const {
    if (count == 0) return {0.0, 0.0, 0.0};
    const double drift = sum / static_cast<double>(count);
    const double m2 = squares - drift * sum;
    return {static_cast<double>(count), static_cast<double>(pivot) + drift, m2 < 0.0 ? 0.0 : m2};
  }
};

// The moments of all threads of a block of at most 32 warps, in thread 0.
__device__ __forceinline__ Moments merge_block(Moments mine) {
  __shared__ double of_warp[32][3];
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Moments other;
    other.count = __shfl_down_sync(kAllLanes, mine.count, lanes);
    other.mean = __shfl_down_sync(kAllLanes, mine.mean, lanes);
    other.m2 = __shfl_down_sync(kAllLanes, mine.m2, lanes);
    if (lane_id() + lanes < 32) mine.merge(other);
  }
  if (lane_id() == 0) {
    double* own = of_warp[threadIdx.x / 32];
    own[0] = mine.count, own[1] = mine.mean, own[2] = mine.m2;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < static_cast<int>(blockDim.x / 32); ++w)
      mine.merge({of_warp[w][0], of_warp[w][1], of_warp[w][2]});
  return mine;
}

// Tiles of a [rows, width] matrix.
struct Tiles {
  int64_t width, per_row, count;

  __device__ __forceinline__ Place at(int64_t tile) const {
    const int64_t row = per_row == count ? 0 : tile / per_row;
    const int64_t begin = (tile - row * per_row) * kTile;
    const int64_t left = width - begin;
    return {row, begin, left < kTile ? static_cast<int>(left) : kTile};
  }
};

namespace {

template <typename A>
__global__ void __launch_bounds__(kWhitenWarps * 32)
    whiten_moments_kernel(TokensView x_view, TokensView mask_view, Tiles tiles,
                          Moments* __restrict__ partials_ptr) {
  __shared__ alignas(16) A stages[kWhitenWarps][kTile];
  const int warp = threadIdx.x / 32;
  Spread<A> spread = Spread<A>::none();
  for (int64_t tile = int64_t{blockIdx.x} * kWhitenWarps + warp; tile < tiles.count;
       tile += int64_t{gridDim.x} * kWhitenWarps) {
    const Place place = tiles.at(tile);
    RawTile<A> raw;
    uint32_t raw_mask;
    const bool as_vector = fetch(x_view, place, raw);
    const bool mask_as_vector = fetch(mask_view, place, raw_mask);
    A x[kPerLane];
    settle(raw, as_vector, x_view.kind, stages[warp], x);
    const unsigned keep = settle(mask_view, place, raw_mask, mask_as_vector);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (keep >> j & 1u) spread.add(x[j]);
  }
  const Moments all = merge_block(spread.moments());
  if (threadIdx.x == 0) partials_ptr[blockIdx.x] = all;
}

// In place where x_view shows out: a warp has read its tile before it writes it.
template <typename A>
__global__ void __launch_bounds__(kWhitenWarps * 32)
    whiten_kernel(TokensView x_view, TokensView mask_view, Tiles tiles,
                  const Moments* __restrict__ partials_ptr, int partials, bool shift_mean,
                  bool unbiased, A* out_ptr) {
  __shared__ alignas(16) A stages[kWhitenWarps][kTile];
  __shared__ A shared_whitening[3];
  const int warp = threadIdx.x / 32;
  Moments mine{0.0, 0.0, 0.0};
  for (int i = threadIdx.x; i < partials; i += kWhitenWarps * 32) mine.merge(partials_ptr[i]);
  mine = merge_block(mine);
  if (threadIdx.x == 0) {
    const Whitening<A> whitening(mine, shift_mean, unbiased);
    shared_whitening[0] = whitening.mean;
    shared_whitening[1] = whitening.scale;
    shared_whitening[2] = whitening.shift;
  }
  __syncthreads();
  const A mean = shared_whitening[0], scale = shared_whitening[1], shift = shared_whitening[2];
  for (int64_t tile = int64_t{blockIdx.x} * kWhitenWarps + warp; tile < tiles.count;
       tile += int64_t{gridDim.x} * kWhitenWarps) {
    const Place place = tiles.at(tile);
    RawTile<A> raw;
    uint32_t raw_mask;
    const bool as_vector = fetch(x_view, place, raw);
    const bool mask_as_vector = fetch(mask_view, place, raw_mask);
    A x[kPerLane];
    settle(raw, as_vector, x_view.kind, stages[warp], x);
    const unsigned keep = settle(mask_view, place, raw_mask, mask_as_vector);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      x[j] = keep >> j & 1u ? whitened(x[j], mean, scale, shift) : A(0);
    put(out_ptr + place.row * tiles.width + place.begin, place.count, stages[warp], x);
  }
}

}  // namespace

// ---- host -------------------------------------------------------------------------------------

// One row if every tensor is flat: then no tile is cut at the end of a row.
inline Tiles tiles_of(const Tensor& x, const TokensView& view, const TokensView& mask_view) {
  const int64_t width = x.size(x.dim() - 1);
  const int64_t rows = x.dim() == 2 ? x.size(0) : 1;
  const auto flat = [&](const TokensView& v) {
    return rows == 1 || v.data == nullptr || v.stride_row == width * v.stride;
  };
  if (flat(view) && flat(mask_view))
    return {rows * width, (rows * width + kTile - 1) / kTile, (rows * width + kTile - 1) / kTile};
  const int64_t per_row = (width + kTile - 1) / kTile;
  return {width, per_row, per_row * rows};
}

inline Tensor new_partials(const Tensor& like, int64_t count) {
  return empty_like_device(like, {count, 3}, ScalarType::Double);
}

// The second launch.
template <typename A>
void whiten_from(const char* op, const TokensView& x, const TokensView& mask, const Tiles& tiles,
                 const Tensor& partials, bool shift_mean, bool unbiased, A* out,
                 cudaStream_t stream) {
  launch(op, whiten_kernel<A>, blocks_for(tiles.count, kWhitenWarps, kMaxPartials),
         kWhitenWarps * 32, 0, stream, x, mask, tiles,
         static_cast<const Moments*>(partials.const_data_ptr()), static_cast<int>(partials.size(0)),
         shift_mean, unbiased, out);
}

}  // namespace rl
