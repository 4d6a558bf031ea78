// Sequence packer. n sequences, k bins, load = tokens in a bin.
//
// 1. Sort by length, longest first, ties by index (stable radix sort).
// 2. k = number of bins of first-fit-decreasing (FFD), at most 11/9 OPT + 6/9 (Dosa 2007), rounded
//    up to `multiple_of`. A max-tree over the free space of the bins finds the first bin that fits.
// 3. Balance by longest-processing-time greedy (LPT): each sequence goes to the lightest of the k
//    bins. The heaviest bin is at most 4/3 - 1/(3k) of optimal (Graham 1969). Kept if no bin
//    overflows.
// 4. LPT overflows only if bins are nearly full or items are large. Then the FFD bins are kept, and
//    up to kMaxMoves moves from the heaviest to the lightest bin even them out.
// 5. Bins are returned heaviest first, so running out of memory shows in the first one, and the
//    `multiple_of` neighbours that data-parallel ranks process together have similar loads.
//
// O(n log k) time, O(n + k) memory, integer arithmetic: deterministic. fastrlhf/train/packing.py
// has the same algorithm in Python; tests compare the two.
#include "packer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fastrlhf {
namespace {

constexpr int kMaxMoves = 256;

// Indices of `lengths`, longest first: stable LSD radix sort on longest - length.
std::vector<int64_t> sort_by_length(std::span<const int64_t> lengths, int64_t longest) {
  constexpr int kBits = 11;
  constexpr int64_t kDigits = int64_t{1} << kBits;
  std::vector<int64_t> order(lengths.size()), next(lengths.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int shift = 0; shift < 63 && (longest >> shift) > 0; shift += kBits) {
    std::array<int64_t, kDigits + 1> start{};
    const auto digit = [&](int64_t i) { return ((longest - lengths[i]) >> shift) & (kDigits - 1); };
    for (const int64_t i : order) ++start[digit(i) + 1];
    for (int64_t d = 0; d < kDigits; ++d) start[d + 1] += start[d];
    for (const int64_t i : order) next[start[digit(i)]++] = i;
    order.swap(next);
  }
  return order;
}

// First-fit-decreasing over sorted lengths. Writes the bin of each item; returns the number of
// bins.
int64_t first_fit(std::span<const int64_t> sorted, int64_t total, int64_t max_tokens,
                  std::vector<int64_t>& bin_of) {
  const int64_t n = static_cast<int64_t>(sorted.size());
  // At most one first-fit bin is at most half full, so twice the lower bound plus one suffices.
  const int64_t most = std::min(n, 2 * (total / max_tokens + 1) + 1);
  const auto leaves = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(most)));
  std::vector<int64_t> room(2 * leaves, max_tokens);  // heap layout: node i has children 2i, 2i + 1
  int64_t bins = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t length = sorted[i];
    int64_t node = 1;
    while (node < leaves) node = 2 * node + (room[2 * node] < length);
    const int64_t bin = node - leaves;
    // Equal lengths are adjacent: fill the bin with as many as fit.
    do {
      room[node] -= length;
      bin_of[i++] = bin;
    } while (i < n && sorted[i] == length && room[node] >= length);
    bins = std::max(bins, bin + 1);
    while ((node >>= 1) >= 1) {
      const int64_t best = std::max(room[2 * node], room[2 * node + 1]);
      if (room[node] == best) break;
      room[node] = best;
    }
  }
  return bins;
}

struct Bin {
  int64_t load;
  int64_t id;
  bool operator<(const Bin& other) const {
    return load < other.load || (load == other.load && id < other.id);
  }
};

// Longest-processing-time greedy into k bins. Returns false, with bin_of incomplete, if a bin would
// overflow.
bool balance(std::span<const int64_t> sorted, int64_t k, int64_t max_tokens,
             std::vector<int64_t>& bin_of) {
  std::vector<Bin> heap(k);  // binary min-heap by load, then id
  for (int64_t b = 0; b < k; ++b) heap[b] = {0, b};
  for (size_t i = 0; i < sorted.size(); ++i) {
    Bin bin = heap[0];
    bin.load += sorted[i];
    if (bin.load > max_tokens) return false;
    bin_of[i] = bin.id;
    int64_t at = 0;
    for (int64_t child = 1; child < k; child = 2 * at + 1) {
      if (child + 1 < k) child += heap[child + 1] < heap[child];
      if (!(heap[child] < bin)) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = bin;
  }
  return true;
}

// Moves items from the heaviest bin to the lightest until they differ by at most max_tokens / 32.
void even_out(std::span<const int64_t> sorted, int64_t k, int64_t max_tokens,
              std::vector<int64_t>& bin_of) {
  std::vector<int64_t> load(k, 0), start(k + 1, 0);
  for (size_t i = 0; i < sorted.size(); ++i) {
    load[bin_of[i]] += sorted[i];
    ++start[bin_of[i] + 1];
  }
  std::partial_sum(start.begin(), start.end(), start.begin());
  // Items of each FFD bin, longest first. A moved item never moves again, so the lists are fixed.
  std::vector<int64_t> item(sorted.size()), fill(start.begin(), start.end() - 1);
  for (size_t i = 0; i < sorted.size(); ++i) item[fill[bin_of[i]]++] = static_cast<int64_t>(i);
  std::vector<char> gives(k);
  for (int64_t b = 0; b < k; ++b) gives[b] = start[b + 1] - start[b] > 1;
  for (int move = 0; move < kMaxMoves; ++move) {
    int64_t from = -1, to = 0;
    for (int64_t b = 0; b < k; ++b) {
      if (gives[b] && (from < 0 || load[b] > load[from])) from = b;
      if (load[b] < load[to]) to = b;
    }
    if (from < 0 || load[from] - load[to] <= max_tokens / 32) return;
    const int64_t half = (load[from] - load[to]) / 2;
    int64_t best = -1;
    for (int64_t j = start[from]; j < start[from + 1] && best < 0; ++j) {
      if (bin_of[item[j]] == from && sorted[item[j]] <= half) best = item[j];
    }
    if (best < 0) {
      gives[from] = 0;
      continue;
    }
    bin_of[best] = to;
    load[from] -= sorted[best];
    load[to] += sorted[best];
  }
}

}  // namespace

Packing pack(std::span<const int64_t> lengths, int64_t max_tokens, int64_t multiple_of) {
  const auto n = static_cast<int64_t>(lengths.size());
  if (max_tokens < 1 || multiple_of < 1) {
    throw std::invalid_argument("max_tokens and multiple_of must be at least 1");
  }
  if (n == 0) return {{}, {0}};
  int64_t total = 0, longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (lengths[i] < 1 || lengths[i] > max_tokens) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "]: expected 1 to " +
                                  std::to_string(max_tokens) + ", got " +
                                  std::to_string(lengths[i]));
    }
    total += lengths[i];
    longest = std::max(longest, lengths[i]);
  }
  const std::vector<int64_t> by_length = sort_by_length(lengths, longest);
  std::vector<int64_t> sorted(n), bin_of(n);
  for (int64_t i = 0; i < n; ++i) sorted[i] = lengths[by_length[i]];

  int64_t k = first_fit(sorted, total, max_tokens, bin_of);
  k = (k + multiple_of - 1) / multiple_of * multiple_of;
  std::vector<int64_t> balanced(n);
  if (balance(sorted, k, max_tokens, balanced)) {
    bin_of.swap(balanced);
  } else {
    even_out(sorted, k, max_tokens, bin_of);
  }

  std::vector<Bin> rank(k);
  for (int64_t b = 0; b < k; ++b) rank[b] = {0, b};
  for (int64_t i = 0; i < n; ++i) rank[bin_of[i]].load -= sorted[i];
  std::sort(rank.begin(), rank.end());  // loads are negated: heaviest first, then lowest id
  std::vector<int64_t> place(k), bin_by_index(n);
  for (int64_t p = 0; p < k; ++p) place[rank[p].id] = p;
  Packing result{std::vector<int64_t>(n), std::vector<int64_t>(k + 1, 0)};
  for (int64_t i = 0; i < n; ++i) {
    bin_by_index[by_length[i]] = place[bin_of[i]];
    ++result.offsets[place[bin_of[i]] + 1];
  }
  std::partial_sum(result.offsets.begin(), result.offsets.end(), result.offsets.begin());
  std::vector<int64_t> at(result.offsets.begin(), result.offsets.end() - 1);
  for (int64_t i = 0; i < n; ++i) result.order[at[bin_by_index[i]]++] = i;
  return result;
}

}  // namespace fastrlhf
