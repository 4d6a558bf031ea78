// ranking_loss on CUDA: all pairs of each prompt, loss and gradient in one launch.
//
// Shapes: P prompts, M completions in all; scores, ranks [M]; cu_groups [P + 1]; margins [P]; loss
// [], grad [M].
//
// A warp takes a prompt; each lane takes a completion and pairs it with all others, so a gradient
// is written by one thread. The weight of a pair needs the number of prompts with a strict pair;
// every block counts them, in time linear in M. Invalid cu_groups (not ascending from 0 to M) give
// NaN loss and gradients: a check without a host sync.
#include "../common/ranking.h"
#include "block_reduce.cuh"
#include "grid_sync.cuh"
#include "launch.cuh"

namespace rl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = kThreads;  // the last block reads one partial per thread

template <typename T>
struct RankingCall {
  const T* scores;
  const int64_t* ranks;
  const int32_t* cu_groups;
  const acc_t<T>* margins;  // [P]; null: 0
  int64_t stride_scores, stride_ranks, stride_cu_groups, stride_margins;
  int64_t prompts, completions;
  acc_t<T>* loss;
  acc_t<T>* grad;  // [M]; null: not wanted
  int blocks;
  Flags flags;      // [blocks]
  double* partial;  // [blocks]

  __device__ __forceinline__ int64_t cut(int64_t p) const {
    return cu_groups[p * stride_cu_groups];
  }
  __device__ __forceinline__ int64_t rank(int64_t i) const { return ranks[i * stride_ranks]; }
  __device__ __forceinline__ acc_t<T> score(int64_t i) const {
    return load(scores[i * stride_scores]);
  }
  __device__ __forceinline__ acc_t<T> margin(int64_t p) const {
    return margins == nullptr ? acc_t<T>(0) : margins[p * stride_margins];
  }
};

// Number of prompts with a strict pair; -1 if cu_groups is invalid.
template <typename T>
__device__ __forceinline__ int64_t count_prompts(const RankingCall<T>& call) {
  int64_t strict = 0;
  int wrong = 0;
  for (int64_t p = threadIdx.x; p < call.prompts; p += kThreads) {
    const int64_t begin = call.cut(p), end = call.cut(p + 1);
    if (begin < 0 || begin > end || end > call.completions) {
      wrong = 1;
      continue;
    }
    for (int64_t i = begin + 1; i < end; ++i) {
      if (call.rank(i) == call.rank(begin)) continue;
      ++strict;
      break;
    }
  }
  if (threadIdx.x == 0 && (call.cut(0) != 0 || call.cut(call.prompts) != call.completions))
    wrong = 1;
  // One reduction for both: there are fewer than 2^40 prompts.
  strict = block_sum(strict + wrong * (int64_t{1} << 40));
  return strict >> 40 ? -1 : strict;
}

// Number of strict pairs among completions [begin, end); called by a whole warp.
template <typename T>
__device__ __forceinline__ int64_t count_pairs(const RankingCall<T>& call, int64_t begin,
                                               int64_t end) {
  int64_t pairs = 0;
  for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
    const int64_t rank = call.rank(i);
    for (int64_t j = begin; j < end; ++j) pairs += ranks_above(rank, call.rank(j));
  }
  return warp_total(pairs);
}

// This lane's part of the loss of a prompt. Writes the gradients of its completions.
template <typename T>
__device__ __forceinline__ double prompt_loss(const RankingCall<T>& call, int64_t begin,
                                              int64_t end, int64_t prompt, double weight) {
  using A = acc_t<T>;
  double loss = 0;
  for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
    const int64_t rank = call.rank(i);
    const A score = call.score(i);
    double grad = 0;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t other = call.rank(j);
      if (rank == other) continue;
      const bool better = ranks_above(rank, other);
      const A there = call.score(j);
      // Read here: a register for the margin would spill in fp64.
      const PairTerm<A> term =
          pair_term(better ? score : there, better ? there : score, call.margin(prompt));
      grad += better ? term.grad : -term.grad;
      loss += better ? term.loss : A(0);
    }
    if (call.grad != nullptr) call.grad[i] = static_cast<A>(weight * grad);
  }
  return weight * loss;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) ranking_loss_fwd_kernel(const RankingCall<T> call) {
  using A = acc_t<T>;
  const int64_t strict = count_prompts(call);
  double loss = 0;
  if (strict < 0) {
    loss = NAN;
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = first; call.grad != nullptr && i < call.completions;
         i += int64_t(call.blocks) * kThreads)
      call.grad[i] = A(NAN);
  } else {
    const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    for (int64_t p = first; p < call.prompts; p += int64_t(call.blocks) * kWarps) {
      const int64_t begin = call.cut(p), end = call.cut(p + 1);
      const int64_t pairs = count_pairs(call, begin, end);
      loss += prompt_loss(call, begin, end, p, pairs > 0 ? pair_weight(pairs, strict) : 0.0);
    }
  }
  loss = block_sum(loss);
  if (threadIdx.x == 0) {
    call.partial[blockIdx.x] = loss;
    call.flags.raise(blockIdx.x);
  }
  __syncthreads();
  if (!call.flags.all_up(0, call.blocks)) return;
  loss = static_cast<int>(threadIdx.x) < call.blocks ? call.partial[threadIdx.x] : 0.0;
  loss = block_sum(loss);
  if (threadIdx.x == 0) *call.loss = static_cast<A>(loss);
  call.flags.clear(call.blocks);
}

std::tuple<Tensor, Tensor> ranking_loss_fwd(const Tensor& scores, const Tensor& ranks,
                                            const Tensor& cu_groups,
                                            const std::optional<Tensor>& margins, bool with_grad) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  RL_CHECK(scores.dim() == 1 && is_float_dtype(scores.scalar_type()),
           "scores: expected a float tensor [M]");
  RL_CHECK(ranks.dim() == 1 && ranks.scalar_type() == ScalarType::Long &&
               ranks.numel() == scores.numel(),
           "ranks: expected one int64 per score");
  RL_CHECK(
      cu_groups.dim() == 1 && cu_groups.numel() >= 1 && cu_groups.scalar_type() == ScalarType::Int,
      "cu_groups: expected an int32 tensor [P + 1]");
  const int64_t prompts = cu_groups.numel() - 1, completions = scores.numel();
  const ScalarType dtype = acc_dtype(scores.scalar_type());
  RL_CHECK(!margins.has_value() || (margins->dim() == 1 && margins->numel() == prompts &&
                                    margins->scalar_type() == dtype),
           "margins: expected the accumulator's dtype, [P]");
  const Tensor loss = empty_like_device(scores, {}, dtype);
  const Tensor grad = empty_like_device(scores, {with_grad ? completions : 0}, dtype);
  // With no prompts, one block writes the zero.
  const int64_t wanted = prompts > 0 ? (prompts + kWarps - 1) / kWarps : 1;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  const Tensor scratch = empty_like_device(scores, {2 * blocks}, ScalarType::Long);
  int64_t* words = static_cast<int64_t*>(scratch.mutable_data_ptr());
  dispatch_float(scores.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const RankingCall<T> call{static_cast<const T*>(scores.const_data_ptr()),
                              static_cast<const int64_t*>(ranks.const_data_ptr()),
                              static_cast<const int32_t*>(cu_groups.const_data_ptr()),
                              margins ? static_cast<const A*>(margins->const_data_ptr()) : nullptr,
                              scores.stride(0),
                              ranks.stride(0),
                              cu_groups.stride(0),
                              margins ? margins->stride(0) : 0,
                              prompts,
                              completions,
                              static_cast<A*>(loss.mutable_data_ptr()),
                              with_grad ? static_cast<A*>(grad.mutable_data_ptr()) : nullptr,
                              blocks,
                              Flags{reinterpret_cast<uint64_t*>(words), next_tag()},
                              reinterpret_cast<double*>(words + blocks)};
    launch("ranking_loss_fwd", ranking_loss_fwd_kernel<T>, static_cast<unsigned>(blocks), kThreads,
           0, current_stream(scores), call);
  });
  return {loss, grad};
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("ranking_loss_fwd", TORCH_BOX(&rl::ranking_loss_fwd));
}
