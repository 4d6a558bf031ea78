// group_advantage on CUDA: rewards relative to those of the same prompt, in one launch.
//
// Shapes: P prompts, M completions in all; rewards, out [M]; cu_groups [P + 1].
//
// A warp takes a prompt. The factor of all groups (the batch's std, or its number of rewards) is
// computed by every block, in time linear in M: a batch has a few thousand rewards. Sums are fp64
// and in a fixed order. Invalid cu_groups (not ascending from 0 to M) give NaN: a check without a
// host sync.
#include "../common/groups.h"
#include "block_reduce.cuh"
#include "launch.cuh"

namespace rl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = 256;

template <typename T>
struct AdvantageCall {
  const T* rewards;
  const int32_t* cu_groups;
  int64_t stride_rewards, stride_cu_groups;
  int64_t prompts, completions;
  GroupSettings settings;
  acc_t<T>* out;  // [M]

  __device__ __forceinline__ int64_t cut(int64_t p) const {
    return cu_groups[p * stride_cu_groups];
  }
  __device__ __forceinline__ double reward(int64_t i) const {
    return static_cast<double>(load(rewards[i * stride_rewards]));
  }
};

// Whether cu_groups does not rise from 0 to M.
template <typename T>
__device__ __forceinline__ bool invalid_groups(const AdvantageCall<T>& call) {
  int wrong = 0;
  for (int64_t p = threadIdx.x; p < call.prompts; p += kThreads)
    if (call.cut(p) > call.cut(p + 1)) wrong = 1;
  if (threadIdx.x == 0 && (call.cut(0) != 0 || call.cut(call.prompts) != call.completions))
    wrong = 1;
  return block_sum(wrong) > 0;
}

// The factor that all groups share.
template <typename T>
__device__ __forceinline__ double batch_factor(const AdvantageCall<T>& call) {
  const double count = static_cast<double>(call.completions);
  if (call.settings.scale == GroupScale::batch_std && call.completions > 0) {
    const double pivot = call.reward(0);
    double sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < call.completions; i += kThreads)
      sum += call.reward(i) - pivot;
    const double mean = block_sum(sum) / count;
    for (int64_t i = threadIdx.x; i < call.completions; i += kThreads) {
      const double d = call.reward(i) - pivot - mean;
      squares += d * d;
    }
    return inverse_std(block_sum(squares), count, call.settings.eps);
  }
  if (call.settings.scale == GroupScale::gpg) {
    int64_t nonzero = 0;
    for (int64_t i = threadIdx.x; i < call.completions; i += kThreads)
      nonzero += call.reward(i) != 0.0;
    return gpg_factor(count, static_cast<double>(block_sum(nonzero)));
  }
  return 1.0;
}

// Writes the advantages of completions [begin, end); called by a whole warp.
template <typename T>
__device__ __forceinline__ void group_advantages(const AdvantageCall<T>& call, int64_t begin,
                                                 int64_t end, double factor) {
  if (begin == end) return;
  const int64_t first = begin + threadIdx.x % 32;
  const double count = static_cast<double>(end - begin), pivot = call.reward(begin);
  double sum = 0, squares = 0;
  for (int64_t i = first; i < end; i += 32) sum += call.reward(i) - pivot;
  const double mean = warp_total(sum) / count;
  if (call.settings.scale == GroupScale::std) {
    for (int64_t i = first; i < end; i += 32) {
      const double d = call.reward(i) - pivot - mean;
      squares += d * d;
    }
    squares = warp_total(squares);
  }
  const GroupAdvantage advantage =
      group_advantage_of(call.settings, pivot, mean, squares, count, factor);
  for (int64_t i = first; i < end; i += 32)
    call.out[i] = static_cast<acc_t<T>>(advantage.of(call.reward(i)));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) group_advantage_kernel(const AdvantageCall<T> call) {
  if (invalid_groups(call)) {
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = first; i < call.completions; i += int64_t(gridDim.x) * kThreads)
      call.out[i] = acc_t<T>(NAN);
    return;
  }
  const double factor = batch_factor(call);
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t p = first; p < call.prompts; p += int64_t(gridDim.x) * kWarps)
    group_advantages(call, call.cut(p), call.cut(p + 1), factor);
}

Tensor group_advantage(const Tensor& rewards, const Tensor& cu_groups, int64_t baseline,
                       int64_t scale, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(rewards.get_device_index());
  RL_CHECK(rewards.dim() == 1 && is_float_dtype(rewards.scalar_type()),
           "rewards: expected a float tensor [M]");
  RL_CHECK(
      cu_groups.dim() == 1 && cu_groups.numel() >= 1 && cu_groups.scalar_type() == ScalarType::Int,
      "cu_groups: expected an int32 tensor [P + 1]");
  RL_CHECK(baseline >= 0 && baseline <= 2 && scale >= 0 && scale <= 3, "unknown baseline or scale");
  const int64_t prompts = cu_groups.numel() - 1, completions = rewards.numel();
  Tensor out = new_tokens(rewards);
  if (completions == 0) return out;
  const int64_t wanted = prompts > 0 ? (prompts + kWarps - 1) / kWarps : 1;
  const unsigned blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  dispatch_float(rewards.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const AdvantageCall<T> call{
        static_cast<const T*>(rewards.const_data_ptr()),
        static_cast<const int32_t*>(cu_groups.const_data_ptr()),
        rewards.stride(0),
        cu_groups.stride(0),
        prompts,
        completions,
        {static_cast<GroupBaseline>(baseline), static_cast<GroupScale>(scale), eps},
        static_cast<acc_t<T>*>(out.mutable_data_ptr())};
    launch("group_advantage", group_advantage_kernel<T>, blocks, kThreads, 0,
           current_stream(rewards), call);
  });
  return out;
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("group_advantage", TORCH_BOX(&rl::group_advantage));
}
