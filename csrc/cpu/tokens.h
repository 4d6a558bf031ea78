// Per-token arguments on CPU: any float dtype and strides, read in runs and converted to the
// accumulator type.
//
// Shapes: B sequences, T steps, N tokens. A padded [B, T] tensor is N = B * T tokens in row-major
// order; sequence b is the flat range [b * T, (b + 1) * T). In a packed [N] tensor it is
// [cu_seqlens[b], cu_seqlens[b + 1]). Outputs are contiguous.
#pragma once

#include <algorithm>
#include <bit>
#include <memory>

#include "../common/isa.h"
#include "../common/math.h"
#include "../common/tensor.h"

namespace rl {

// Tokens per block: the unit of conversion to scratch memory and of the fixed-order sums. Blocks
// are cut by flat token index, so sums do not depend on the number of threads or on strides.
constexpr int64_t kBlock = 1024;
// Minimum work per thread, in blocks and in tokens.
constexpr int64_t kGrainBlocks = 12;
constexpr int64_t kGrainTokens = kGrainBlocks * kBlock;

// keep ? a : b for a mask byte, without a branch: ragged masks mispredict. A kept byte need not be
// 1: a bool view of a numpy array may hold any value.
template <typename A>
RL_INLINE A blend(uint8_t keep, A a, A b) {
  using Bits = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;
  const Bits kept = std::bit_cast<Bits>(a), masked = Bits{0} - Bits{keep == 0};
  return std::bit_cast<A>(kept ^ ((kept ^ std::bit_cast<Bits>(b)) & masked));
}

// A 1-d or 2-d float tensor of tokens.
class Tokens {
 public:
  Tokens() = default;
  explicit Tokens(const Tensor& t) : dtype_(t.scalar_type()), count_(t.numel()) {
    RL_CHECK(t.dim() == 1 || t.dim() == 2, "expected a 1-d or 2-d tensor, got ", t.dim(), "-d");
    RL_CHECK(is_float_dtype(dtype_), "expected a float tensor");
    data_ = static_cast<const char*>(t.const_data_ptr());
    inner_ = t.size(t.dim() - 1);
    inner_stride_ = t.stride(t.dim() - 1);
    outer_stride_ = t.dim() == 2 ? t.stride(0) : 0;
    flat_ = t.dim() == 1 || t.size(0) == 1 || outer_stride_ == inner_ * inner_stride_;
  }
  // `count` contiguous tokens.
  template <typename A>
  Tokens(const A* data, int64_t count)
      : data_(reinterpret_cast<const char*>(data)),
        dtype_(std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float),
        count_(count),
        inner_(count) {}
  explicit Tokens(const std::optional<Tensor>& t) : Tokens(t.has_value() ? Tokens(*t) : Tokens()) {}

  bool defined() const { return data_ != nullptr || count_ > 0; }
  int64_t count() const { return count_; }

  // Tokens [start, start + count): in place if they are contiguous and of type A, else converted
  // into `scratch`.
  template <typename A>
  const A* load(int64_t start, int64_t count, A* scratch) const {
    if (in_place<A>()) return reinterpret_cast<const A*>(data_) + start;
    switch (dtype_) {
      case ScalarType::Double:
        return copy<double>(start, count, scratch);
      case ScalarType::Float:
        return copy<float>(start, count, scratch);
      case ScalarType::Half:
        return copy<f16>(start, count, scratch);
      default:
        return copy<bf16>(start, count, scratch);
    }
  }

  // The same with masked tokens set to 0, so that masked values, NaN included, never enter a sum.
  template <typename A>
  const A* load(int64_t start, int64_t count, const uint8_t* keep, A* scratch) const {
    const A* x = load(start, count, scratch);
    if (keep == nullptr) return x;
    for (int64_t i = 0; i < count; ++i) scratch[i] = blend(keep[i], x[i], A(0));
    return scratch;
  }

 private:
  template <typename A>
  bool in_place() const {
    constexpr ScalarType own = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    return dtype_ == own && inner_stride_ == 1 && flat_;
  }

  template <typename T, typename A>
  const A* copy(int64_t start, int64_t count, A* scratch) const {
    const T* data = reinterpret_cast<const T*>(data_);
    for (int64_t done = 0; done < count;) {
      const int64_t row = flat_ ? 0 : (start + done) / inner_;
      const int64_t column = start + done - row * inner_;
      const int64_t run = flat_ ? count : std::min(count - done, inner_ - column);
      const T* source = data + row * outer_stride_ + column * inner_stride_;
      if (inner_stride_ == 1) {
        for (int64_t i = 0; i < run; ++i) scratch[done + i] = static_cast<A>(rl::load(source[i]));
      } else {
        for (int64_t i = 0; i < run; ++i)
          scratch[done + i] = static_cast<A>(rl::load(source[i * inner_stride_]));
      }
      done += run;
    }
    return scratch;
  }

  const char* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t count_ = 0;
  int64_t inner_ = 0;         // tokens per row
  int64_t inner_stride_ = 1;  // elements
  int64_t outer_stride_ = 0;  // elements
  bool flat_ = true;          // a single stride covers all tokens
};

// The optional bool mask of the tokens as contiguous bytes, 0 where masked. Without a mask, data()
// is null and every token counts.
class Mask {
 public:
  Mask(const std::optional<Tensor>& mask, int64_t count) {
    if (!mask.has_value()) return;
    RL_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected a bool tensor");
    RL_CHECK(mask->numel() == count, "mask: expected ", count, " elements, got ", mask->numel());
    tensor_ = contiguous(*mask);
    data_ = static_cast<const uint8_t*>(tensor_->const_data_ptr());
  }
  // Mask bytes of tokens [start, start + count); null if none of them is masked.
  const uint8_t* from(int64_t start, int64_t count) const {
    if (data_ == nullptr) return nullptr;
    uint8_t all = 1;
    for (int64_t i = start; i < start + count; ++i) all &= data_[i] != 0;
    return all ? nullptr : data_ + start;
  }
  // All mask bytes, or null.
  const uint8_t* data() const { return data_; }
  // The smallest subrange of [begin, end) that holds all unmasked tokens; {end, end} if there are
  // none.
  std::pair<int64_t, int64_t> kept_range(int64_t begin, int64_t end) const {
    if (data_ == nullptr) return {begin, end};
    constexpr int64_t kLine = 64;
    const auto none_of_line = [&](int64_t at) {
      uint8_t any = 0;
      for (int64_t i = at; i < at + kLine; ++i) any |= data_[i];
      return any == 0;
    };
    while (end - begin >= kLine && none_of_line(begin)) begin += kLine;
    while (begin < end && !data_[begin]) ++begin;
    int64_t last = end;
    while (last - begin >= kLine && none_of_line(last - kLine)) last -= kLine;
    while (last > begin && !data_[last - 1]) --last;
    return {begin == end ? end : begin, last};
  }
  // Number of unmasked tokens.
  int64_t count_kept(int64_t tokens) const {
    if (data_ == nullptr) return tokens;
    int64_t kept = 0;
    for (int64_t at = 0; at < tokens; at += kBlock) {
      const int64_t end = std::min(at + kBlock, tokens);
      int32_t block = 0;  // 32 bits, so that the loop vectorises well
      for (int64_t i = at; i < end; ++i) block += data_[i] != 0;
      kept += block;
    }
    return kept;
  }

 private:
  std::optional<Tensor> tensor_;
  const uint8_t* data_ = nullptr;
};

// Sequence boundaries among the N tokens.
class Sequences {
 public:
  Sequences(const Tensor& like, const std::optional<Tensor>& cu_seqlens) : tokens_(like.numel()) {
    if (!cu_seqlens.has_value()) {
      RL_CHECK(like.dim() == 2, "expected a [B, T] tensor, or cu_seqlens");
      count_ = like.size(0);
      steps_ = like.size(1);
      return;
    }
    RL_CHECK(like.dim() == 1, "expected a packed [N] tensor with cu_seqlens");
    set_boundaries(*cu_seqlens);
  }
  // Of tokens in any layout.
  Sequences(int64_t tokens, const Tensor& cu_seqlens) : tokens_(tokens) {
    set_boundaries(cu_seqlens);
  }

  int64_t count() const { return count_; }
  int64_t begin(int64_t b) const { return cu_ ? cu_[b] : b * steps_; }
  int64_t end(int64_t b) const { return cu_ ? cu_[b + 1] : (b + 1) * steps_; }

  // Calls f(first, last) on threads, for ranges of sequences with about equally many tokens.
  template <typename F>
  void parallel(const F& f) const {
    torch::stable::parallel_for(0, tokens_, kGrainTokens, [&](int64_t begin, int64_t end) {
      f(starting_from(begin), starting_from(end));
    });
  }

 private:
  void set_boundaries(const Tensor& cu_seqlens) {
    RL_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 &&
                 cu_seqlens.scalar_type() == ScalarType::Int,
             "cu_seqlens: expected an int32 tensor [B + 1]");
    cu_tensor_ = contiguous(cu_seqlens);
    cu_ = static_cast<const int32_t*>(cu_tensor_->const_data_ptr());
    count_ = cu_seqlens.numel() - 1;
    RL_CHECK(cu_[0] == 0 && cu_[count_] == tokens_, "cu_seqlens: expected to run from 0 to ",
             tokens_);
    for (int64_t b = 0; b < count_; ++b)
      RL_CHECK(cu_[b] <= cu_[b + 1], "cu_seqlens: decreases at ", b + 1);
  }

  // The first sequence that begins at or after `token`.
  int64_t starting_from(int64_t token) const {
    if (cu_) return std::lower_bound(cu_, cu_ + count_, token) - cu_;
    return std::min(count_, (token + steps_ - 1) / steps_);
  }

  int64_t tokens_ = 0;
  int64_t count_ = 0;
  int64_t steps_ = 0;
  std::optional<Tensor> cu_tensor_;
  const int32_t* cu_ = nullptr;
};

// A per-sequence argument [B] (score, bootstrap) in type A; empty if absent.
template <typename A>
std::vector<A> per_sequence(const std::optional<Tensor>& t, int64_t count, const char* name) {
  std::vector<A> out;
  if (!t.has_value()) return out;
  RL_CHECK(t->dim() == 1 && t->numel() == count, name, ": expected [", count, "]");
  out.resize(count);
  const A* loaded = Tokens(*t).load(0, count, out.data());
  if (loaded != out.data()) std::copy(loaded, loaded + count, out.begin());
  return out;
}

// Calls f(block, start, count) for every block of kBlock tokens, on threads, compiled for the best
// instruction set.
template <typename F>
void for_each_block(int64_t tokens, const F& f) {
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    dispatch_isa([&](auto) RL_LAMBDA_INLINE {
      for (int64_t block = first; block < last; ++block) {
        f(block, block * kBlock, std::min(kBlock, tokens - block * kBlock));
      }
    });
  });
}

}  // namespace rl
