// Runs CUDA kernels on the CPU: every thread of a cluster of blocks is a fiber, clusters run one
// after another. Without clusters each block is one.
//
// A fiber runs until it must wait (a barrier, a warp's meeting), so a cluster that synchronises
// properly gives the same bits in whatever order its fibers run, and one that does not shows it.
// Shared memory is fresh from malloc, filled with NaN, for every block: AddressSanitizer guards its
// ends. What hardware leaves undefined is an error here: see fail() in fibers.cpp and below.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace shim {

// Where in the .cu file a thread waits; taken where the default argument is evaluated.
struct Place {
  const char* what;
  const char* file;
  int line;
};

// What the lanes of one warp bring to a __*_sync intrinsic; kept until each of them has read it.
struct Meeting {
  Place place{};
  unsigned mask = 0, arrived = 0, unread = 0;
  alignas(8) unsigned char brought[32][8] = {};
};

// Of the clusters; shuffled also reverses the blocks of a cluster and the threads of a block.
enum class Order { ascending, shuffled };
inline Order order = Order::ascending;

// Runs body() once a thread; `cluster` neighbours in x run at the same time and see each other's
// shared memory. Throws std::runtime_error for a launch that cannot end well.
void run(dim3 grid, dim3 block, unsigned cluster, size_t dynamic_bytes,
         const std::function<void()>& body);

// The rest is called by a kernel's threads. fail() does not return: the launch throws.
[[noreturn]] void fail(const char* why, Place place);
void entered(const char* kernel);
void* shared(const void* site, size_t bytes);
void* dynamic_shared();
Meeting& meet(Place place, unsigned mask, const void* value, size_t bytes);
void leave(Meeting& meeting);
int lane();

// __syncthreads and its relatives; the sum of all threads' values.
int barrier(Place place, int value);

// Clusters. remote(): the address in block `rank` of the shared variable that lies at `here`.
unsigned cluster_size();
unsigned cluster_rank();
void arrive_at_cluster(Place place);
void wait_for_cluster(Place place);
void* remote(Place place, const void* here, unsigned rank, size_t bytes);

// Asynchronous copies of 16 bytes: the target is NaN until the thread waits for the copy's group.
void begin_copy(Place place, void* to_shared, const void* from);
void close_copy_group();
void wait_for_copies(size_t open_groups);

inline void check_lane(const Meeting& m, int source) {
  if (source < 0 || source > 31 || !(m.mask >> source & 1))
    fail("it reads a lane that is not in its mask", m.place);
}

// pick(lane) is the lane whose value this thread gets.
template <typename T, typename Pick>
T shuffle(Place place, unsigned mask, T value, int width, Pick pick) {
  static_assert(sizeof(T) <= 8, "the hardware shuffles up to 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1))) fail("its width is no power of two", place);
  Meeting& m = meet(place, mask, &value, sizeof(T));
  const int source = pick(lane());
  check_lane(m, source);
  T got;
  std::memcpy(&got, m.brought[source], sizeof(T));
  leave(m);
  return got;
}

template <typename T, typename Combine>
T reduce(Place place, unsigned mask, T value, Combine combine) {
  Meeting& m = meet(place, mask, &value, sizeof(T));
  bool first = true;
  T all{};
  for (int i = 0; i < 32; ++i) {
    if (!(m.mask >> i & 1)) continue;
    T theirs;
    std::memcpy(&theirs, m.brought[i], sizeof(T));
    all = first ? theirs : combine(all, theirs);
    first = false;
  }
  leave(m);
  return all;
}

}  // namespace shim
