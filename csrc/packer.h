// Sequence packer: variable-length sequences into micro-batches of at most max_tokens tokens.
//
// n sequences, k bins. Neither torch nor Python here; csrc/python.cpp binds it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastrlhf {

// Bin b holds the sequences order[offsets[b] .. offsets[b + 1]), ascending.
struct Packing {
  std::vector<int64_t> order;    // [n]
  std::vector<int64_t> offsets;  // [k + 1]
};

// Every length must lie in [1, max_tokens]; the algorithm and its guarantees are in packer.cpp.
Packing pack(std::span<const int64_t> lengths, int64_t max_tokens, int64_t multiple_of);

}  // namespace fastrlhf
