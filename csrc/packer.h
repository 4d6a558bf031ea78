// Sequence packer: groups n variable-length sequences into k bins (micro-batches) of at most
// max_tokens tokens. Independent of torch and Python; csrc/python.cpp binds it.
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

// Lengths must be in [1, max_tokens]. packer.cpp documents the algorithm and its guarantees.
Packing pack(std::span<const int64_t> lengths, int64_t max_tokens, int64_t multiple_of);

}  // namespace fastrlhf
