// ppo_loss on CUDA: loss, gradients and metrics in one launch, one read of every token.
//
// N tokens, 1-d or 2-d tensors of any strides; tiles of kTile tokens. Block b sums the tiles b,
// b + blocks, ... and leaves one PpoSums; the last block to finish merges them in the order of the
// blocks, so that no sum depends on which it was. The gradients need 1 / n, hence every block has
// to know the whole mask: it counts a slice, tells the others, and counts further only what it has
// not been told. No block ever waits for another.
#include "../ppo_loss.h"
#include "blocks.cuh"
#include "launch.cuh"
#include "tokens.cuh"

namespace rl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 4;  // of a thread in a tile
constexpr int kTile = kThreads * kTokens;
constexpr int kMaxBlocks = kThreads;  // one thread of the last block for each
constexpr int64_t kSlice = 65536;     // bytes of mask that a block counts rather than be told

template <typename A>
struct PpoCall {
  TokenView logprob, old_logprob, advantages, values, old_values, returns, entropy, mask;
  A low, high, dual_clip, value_clip;
  double value_coef, entropy_coef;
  A *grad_logprob, *grad_values, *grad_entropy;  // null: not wanted
  A* loss;
  float* metrics;
  int64_t tokens;
  int blocks;
  int slices;             // of the mask, at most kMaxBlocks; 0 without a mask
  int64_t slice;          // tokens of one, a multiple of 16
  Flags flags;            // slices + blocks of them
  int64_t* kept;          // [slices]
  PpoSums<double>* sums;  // [blocks]
};

// Moments about the first value that a thread sees: equal values leave no deviation.
template <typename A>
struct Deviations {
  A origin, sum, squares;

  __device__ __forceinline__ void add(bool first, A x) {
    if (first) origin = x;
    const A d = x - origin;
    sum += d;
    squares += d * d;
  }
  __device__ __forceinline__ MomentsOf<A> moments(A count) const {
    MomentsOf<A> out;
    if (count == A(0)) return out;
    const A shift = sum / count;
    const A m2 = squares - sum * shift;
    out.count = count;
    out.mean = origin + shift;
    out.m2 = m2 < A(0) ? A(0) : m2;  // NaN stays NaN
    return out;
  }
};

template <typename S>
__device__ __forceinline__ MomentsOf<S> shifted(const MomentsOf<S>& x, int lanes) {
  MomentsOf<S> out;
  out.count = __shfl_down_sync(~0u, x.count, lanes);
  out.mean = __shfl_down_sync(~0u, x.mean, lanes);
  out.m2 = __shfl_down_sync(~0u, x.m2, lanes);
  return out;
}

// Lane 0 gets the merged sums of the first `lanes` lanes, a power of two.
template <typename S>
__device__ __forceinline__ void merge_warp(PpoSums<S>& mine, int lanes) {
#pragma unroll 1
  for (int step = lanes / 2; step > 0; step /= 2) {
    PpoSums<S> other;
#pragma unroll
    for (int i = 0; i < kMetrics; ++i) other.sum[i] = __shfl_down_sync(~0u, mine.sum[i], step);
    other.target = shifted(mine.target, step);
    other.error = shifted(mine.error, step);
    mine.merge(other);
  }
}

__device__ __forceinline__ MomentsOf<double> widened(const MomentsOf<float>& x) {
  MomentsOf<double> out;
  out.count = x.count, out.mean = x.mean, out.m2 = x.m2;
  return out;
}
__device__ __forceinline__ PpoSums<double> widened(const PpoSums<double>& x) { return x; }
__device__ __forceinline__ PpoSums<double> widened(const PpoSums<float>& x) {
  PpoSums<double> out;
#pragma unroll
  for (int i = 0; i < kMetrics; ++i) out.sum[i] = x.sum[i];
  out.target = widened(x.target);
  out.error = widened(x.error);
  return out;
}

// Thread 0 gets the merged sums of all threads: within a warp in S, then in fp64.
template <typename S>
__device__ __forceinline__ PpoSums<double> merge_block(PpoSums<S> mine) {
  __shared__ double of_warp[kWarps][sizeof(PpoSums<double>) / sizeof(double)];
  merge_warp(mine, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // what was here before has been read
  if (lane == 0) *reinterpret_cast<PpoSums<double>*>(of_warp[warp]) = widened(mine);
  __syncthreads();
  PpoSums<double> all;
  if (warp > 0) return all;
  if (lane < kWarps) all = *reinterpret_cast<const PpoSums<double>*>(of_warp[lane]);
  merge_warp(all, kWarps);
  return all;
}

// One byte of 0 or 1 for each token: the sum of sixteen.
__device__ __forceinline__ int count_bytes(uint4 v) {
  return static_cast<int>(((v.x + v.y + v.z + v.w) * 0x01010101u) >> 24);
}

// The unmasked tokens of one slice, counted by a block.
template <typename A>
__device__ __forceinline__ int64_t count_slice(const PpoCall<A>& call, int slice) {
  const int64_t begin = slice * call.slice;
  const int64_t end = begin + call.slice < call.tokens ? begin + call.slice : call.tokens;
  int64_t single = begin;  // what vectors do not cover starts here
  int64_t kept = 0;
  if (call.mask.wide_vector) {
    const char* bytes = static_cast<const char*>(call.mask.data);
    if (begin < end) single = end - (end - begin) % 16;
#pragma unroll 8
    for (int64_t i = begin + 16 * threadIdx.x; i < single; i += 16 * kThreads)
      kept += count_bytes(*reinterpret_cast<const uint4*>(bytes + i));
  }
  for (int64_t i = single + threadIdx.x; i < end; i += kThreads) kept += call.mask.kept(i);
  return block_sum<kThreads>(kept);
}

// All unmasked tokens. Blocks begin at different slices, so that most of them are told most.
template <typename A>
__device__ __forceinline__ int64_t count_kept(const PpoCall<A>& call) {
  __shared__ int nearest;
  const int mine = static_cast<int>(threadIdx.x);
  int slice = static_cast<int>(blockIdx.x) % call.slices;
  while (true) {
    const int64_t counted = count_slice(call, slice);
    if (call.slices == 1) return counted;
    if (mine == 0) {
      nearest = call.slices;
      call.kept[slice] = counted;
      call.flags.raise(slice);
    }
    __syncthreads();
    int64_t told = 0;
    if (mine < call.slices) {
      if (call.flags.is_up(mine)) {
        __threadfence();
        told = *static_cast<const volatile int64_t*>(call.kept + mine);
      } else {
        atomicMin(&nearest, mine > slice ? mine - slice : mine - slice + call.slices);
      }
    }
    told = block_sum<kThreads>(told);
    if (nearest == call.slices) return told;
    slice = (slice + nearest) % call.slices;
  }
}

template <typename A>
__device__ __forceinline__ void write(A* to, const A (&x)[kTokens], int64_t i, int valid) {
  if (to == nullptr) return;
  if (valid == kTokens) {
    constexpr int kSize = Vector<A>::kSize;
#pragma unroll
    for (int k = 0; k < kTokens; k += kSize) {
      Vector<A> v;
#pragma unroll
      for (int j = 0; j < kSize; ++j) v.at[j] = x[k + j];
      write_vector(to + i + k, v);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    if (k < valid) to[i + k] = x[k];
  }
}

// The tokens of one thread, 0 where masked, so that nothing behind the mask enters any sum.
template <typename A>
__device__ __forceinline__ void unpack(const TokenView& view, const Quad<A>& quad, int valid,
                                       const bool (&keep)[kTokens], A (&x)[kTokens]) {
  view.convert(quad, valid, x);
#pragma unroll
  for (int k = 0; k < kTokens; ++k) x[k] = keep[k] ? x[k] : A(0);
}

template <typename A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 2 : 1)
    ppo_loss_fwd_kernel(const PpoCall<A> call) {
  const int block = static_cast<int>(blockIdx.x);
  const bool has_values = call.values.data != nullptr;
  const bool has_old_values = call.old_values.data != nullptr;
  double normaliser = call.tokens > 0 ? static_cast<double>(call.tokens) : 1.0;
  bool counted = call.slices == 0;
  PpoSums<A> mine;
  Deviations<A> target{}, error{};
  int kept = 0;
  for (int64_t start = int64_t(block) * kTile; start < call.tokens;
       start += int64_t(call.blocks) * kTile) {
    const int64_t i = start + threadIdx.x * kTokens;
    const int64_t left = call.tokens - i;
    const int valid = left >= kTokens ? kTokens : left > 0 ? static_cast<int>(left) : 0;
    const Quad<float> mask = call.mask.read_mask(i, valid);
    const Quad<A> raw_logprob = call.logprob.template read<A>(i, valid);
    const Quad<A> raw_old_logprob = call.old_logprob.template read<A>(i, valid);
    const Quad<A> raw_advantages = call.advantages.template read<A>(i, valid);
    const Quad<A> raw_values = call.values.template read<A>(i, valid);
    const Quad<A> raw_old_values = call.old_values.template read<A>(i, valid);
    const Quad<A> raw_returns = call.returns.template read<A>(i, valid);
    const Quad<A> raw_entropy = call.entropy.template read<A>(i, valid);
    if (!counted) {  // while the reads above are under way
      const int64_t count = count_kept(call);
      normaliser = count > 0 ? static_cast<double>(count) : 1.0;
      counted = true;
    }
    bool keep[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) keep[k] = call.mask.keeps(mask, k, valid);

    A logprob[kTokens], old_logprob[kTokens], advantage[kTokens];
    unpack(call.logprob, raw_logprob, valid, keep, logprob);
    unpack(call.old_logprob, raw_old_logprob, valid, keep, old_logprob);
    unpack(call.advantages, raw_advantages, valid, keep, advantage);
    A grad_logprob[kTokens], grad_value[kTokens] = {};
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const PolicyTerm<A> term = policy_term(logprob[k], old_logprob[k], advantage[k], call.low,
                                             call.high, call.dual_clip);
      const A ratio = keep[k] ? term.ratio : A(0);
      mine.sum[kPolicyLoss] += term.loss;
      mine.sum[kApproxKl] += term.kl;
      mine.sum[kClipFraction] += term.clipped;
      mine.sum[kRatioMean] += ratio;
      mine.sum[kRatioMax] = ratio > mine.sum[kRatioMax] ? ratio : mine.sum[kRatioMax];
      grad_logprob[k] = term.grad;
    }
    if (has_values) {
      A value[kTokens], old_value[kTokens], wanted[kTokens];
      unpack(call.values, raw_values, valid, keep, value);
      unpack(call.returns, raw_returns, valid, keep, wanted);
      unpack(call.old_values, raw_old_values, valid, keep, old_value);
      int seen = kept;
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        const A old = has_old_values ? old_value[k] : value[k];
        const ValueTerm<A> term = value_term(value[k], old, wanted[k], call.value_clip);
        mine.sum[kValueLoss] += term.loss;
        mine.sum[kValueClipFraction] += term.clipped;
        grad_value[k] = term.grad;
        if (!keep[k]) continue;
        target.add(seen == 0, wanted[k]);
        error.add(seen == 0, value[k] - wanted[k]);
        ++seen;
      }
    }
    if (call.entropy.data != nullptr) {
      A entropy[kTokens];
      unpack(call.entropy, raw_entropy, valid, keep, entropy);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) mine.sum[kEntropy] += entropy[k];
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) kept += keep[k];

    const A per_token = static_cast<A>(1 / normaliser);
    const A value_weight = static_cast<A>(call.value_coef) * per_token;
    const A entropy_weight = -static_cast<A>(call.entropy_coef) * per_token;
    A grad_entropy[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      grad_logprob[k] *= per_token;
      grad_value[k] *= value_weight;
      grad_entropy[k] = keep[k] ? entropy_weight : A(0);
    }
    write(call.grad_logprob, grad_logprob, i, valid);
    write(call.grad_values, grad_value, i, valid);
    write(call.grad_entropy, grad_entropy, i, valid);
  }
  if (has_values) {
    mine.target = target.moments(static_cast<A>(kept));
    mine.error = error.moments(static_cast<A>(kept));
  }
  PpoSums<double> all = merge_block(mine);
  if (threadIdx.x == 0) {
    call.sums[block] = all;
    call.flags.raise(call.slices + block);
  }
  __syncthreads();
  if (!call.flags.all_up(call.slices, call.blocks)) return;

  PpoSums<double> one;
  if (static_cast<int>(threadIdx.x) < call.blocks) one = call.sums[threadIdx.x];
  all = merge_block(one);
  if (threadIdx.x == 0) {
    *call.loss = static_cast<A>(
        ppo_finish(all, normaliser, call.value_coef, call.entropy_coef, call.metrics));
  }
  call.flags.take_down(call.slices + call.blocks);
}

int blocks_for(int64_t tokens, int64_t each) {
  const int64_t blocks = (tokens + each - 1) / each;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_fwd(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages,
    const std::optional<Tensor>& values, const std::optional<Tensor>& old_values,
    const std::optional<Tensor>& returns, const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& mask, double clip, double dual_clip, double value_clip,
    double value_coef, double entropy_coef, bool with_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  const PpoInputs in{logprob, old_logprob, advantages, values, old_values, returns, entropy};
  in.check();
  const int64_t tokens = logprob.numel();
  RL_CHECK(
      !mask.has_value() || (mask->scalar_type() == ScalarType::Bool && mask->numel() == tokens),
      "mask: expected a bool tensor of ", tokens, " elements");
  const PpoOutputs out(in, with_grad);
  // Where there is nothing to sum, one block writes the zeros.
  const int blocks = tokens > 0 ? blocks_for(tokens, kTile) : 1;
  const int slices = mask.has_value() ? blocks_for(tokens, kSlice) : 0;
  const int64_t slice = slices > 0 ? (tokens + slices - 1) / slices : 0;
  constexpr int64_t kWords = sizeof(PpoSums<double>) / sizeof(int64_t);
  const Tensor scratch =
      empty_like_device(logprob, {blocks * kWords + slices + slices + blocks}, ScalarType::Long);
  int64_t* words = static_cast<int64_t*>(scratch.mutable_data_ptr());
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const PpoCall<A> call{
        TokenView(logprob),
        TokenView(old_logprob),
        TokenView(advantages),
        TokenView(values),
        TokenView(old_values),
        TokenView(returns),
        TokenView(entropy),
        TokenView(mask),
        static_cast<A>(1 - clip),
        static_cast<A>(1 + clip),
        static_cast<A>(dual_clip),
        static_cast<A>(value_clip),
        value_coef,
        entropy_coef,
        PpoOutputs::address<A>(out.grad_logprob, with_grad),
        PpoOutputs::address<A>(out.grad_values, with_grad && values.has_value()),
        PpoOutputs::address<A>(out.grad_entropy, with_grad && entropy.has_value()),
        static_cast<A*>(out.loss.mutable_data_ptr()),
        static_cast<float*>(out.metrics.mutable_data_ptr()),
        tokens,
        blocks,
        slices,
        (slice + 15) / 16 * 16,
        Flags{reinterpret_cast<uint64_t*>(words + blocks * kWords + slices), next_tag()},
        words + blocks * kWords,
        reinterpret_cast<PpoSums<double>*>(words)};
    launch("ppo_loss_fwd", ppo_loss_fwd_kernel<A>, static_cast<unsigned>(blocks), kThreads, 0,
           current_stream(logprob), call);
  };
  if (logprob.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return out.tuple();
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("ppo_loss_fwd", TORCH_BOX(&rl::ppo_loss_fwd));
}
