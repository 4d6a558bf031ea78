// The scheduler behind fibers.h.

#include "fibers.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)
// Saves what a call must keep and changes stacks; swapcontext would ask the kernel twice a switch.
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.type shim_switch,@function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch,.-shim_switch
)");
namespace {
struct Context {
  void* top = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    // Six registers and the return address; entry() meets the alignment of a function just called.
    void** at = reinterpret_cast<void**>(stack + bytes) - 8;
    std::fill(at, at + 8, nullptr);
    at[6] = reinterpret_cast<void*>(entry);
    top = at;
  }
  static void swap(Context& from, Context& to) { shim_switch(&from.top, to.top); }
};
}  // namespace
#else
#include <ucontext.h>
namespace {
struct Context {
  ucontext_t at;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&at);
    at.uc_stack = {};
    at.uc_stack.ss_sp = stack;
    at.uc_stack.ss_size = bytes;
    at.uc_link = nullptr;
    makecontext(&at, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.at, &to.at); }
};
}  // namespace
#endif

namespace shim {
namespace {

constexpr size_t kStackBytes = 128 << 10, kPage = 4096, kMostThreads = 8 * 1024;
constexpr int kPoison = 0xff;  // NaN in every float type, -1 in every integer

enum class State { ready, at_barrier, at_cluster_barrier, in_meeting, returned };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  Context context;
  State state;
  Place place;
  uint3 index;
  void* fake_stack;
  bool arrived;                          // at the cluster's barrier, and has not waited
  uint64_t phase;                        // of that barrier, when it arrived
  std::deque<std::vector<Copy>> copies;  // groups under way; the last one is open
};

struct Warp {
  std::deque<Meeting> meetings;  // references stay valid
};

struct Memory {
  std::unique_ptr<char[]> at;
  size_t bytes;
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, Memory> shared;  // by the place of the variable's declaration
  int waiting, sum, result;
  Place barrier{};
  size_t left;  // threads that have not returned
  bool started;

  // The same for all threads; fresh for whoever comes first.
  char* memory(const void* site, size_t bytes) {
    auto& [at, size] = shared[site];
    if (!at) {
      at.reset(new char[bytes]);  // aligned to 16 bytes
      size = bytes;
      std::memset(at.get(), kPoison, bytes);
    }
    return at.get();
  }
};

std::mutex launching;
std::vector<Block> cluster;  // that runs now
size_t arrived;              // its threads at its barrier
uint64_t phase;              // barriers that it has passed
Block* block;                // of the fiber that runs
int current;                 // the fiber's number in it
size_t dynamic_bytes;
const char dynamic_site = 0;
std::string error;
const std::function<void()>* kernel_body;
std::set<std::string> kernels_run;
const char* kernel_name = "?";
Context scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

char* stack_of(size_t thread) {
  // One mapping for all stacks, whose untouched pages cost nothing; a guard page below each that is
  // used. Every guard splits the mapping, and each library has stacks of its own: guards below all
  // of them would exceed what the kernel allows a process (65,530 mappings).
  static char* const all = [] {
    void* at = mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) std::abort();
    return static_cast<char*>(at);
  }();
  static size_t guarded = 0;
  for (; guarded <= thread; ++guarded) {
    if (mprotect(all + guarded * kStackBytes, kPage, PROT_NONE) != 0) std::abort();
  }
  return all + thread * kStackBytes + kPage;
}

void to_scheduler(bool for_good) {
  Fiber& me = block->fibers[current];
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  Context::swap(me.context, scheduler);
  __sanitizer_finish_switch_fiber(me.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel_body)();
  block->fibers[current].state = State::returned;
  to_scheduler(true);
  std::abort();
}

void resume(Block& of, int thread) {
  block = &of;
  current = thread;
  Fiber& fiber = of.fibers[thread];
  threadIdx = fiber.index;
  blockIdx = of.index;
  of.started = true;
  const size_t number = (&of - cluster.data()) * of.fibers.size() + thread;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_of(number), kStackBytes - kPage);
  Context::swap(scheduler, fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

std::string text(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(place.what) + " (" + (slash ? slash + 1 : place.file) + ":" +
         std::to_string(place.line) + ")";
}

std::string where() {
  return std::string("host shim: ") + kernel_name + ", block (" + std::to_string(blockIdx.x) +
         ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

// Nobody can go on: who waits where, and who has left.
std::string deadlock() {
  struct Group {
    int size = 0;
    std::string first;
  };
  std::map<std::string, Group> groups;
  for (const Block& b : cluster) {
    for (size_t i = 0; i < b.fibers.size(); ++i) {
      const Fiber& f = b.fibers[i];
      Group& group = groups[f.state == State::returned ? "returned" : "wait at " + text(f.place)];
      if (group.size++ > 0) continue;
      group.first = "thread " + std::to_string(i);
      if (cluster.size() > 1) group.first += " of block " + std::to_string(&b - cluster.data());
    }
  }
  std::string message =
      where() + ": the threads of the " + (cluster.size() > 1 ? "cluster" : "block") + " diverge:";
  for (const auto& [what, group] : groups)
    message +=
        " " + std::to_string(group.size) + " " + what + ", the first is " + group.first + ";";
  return message;
}

void prepare_block(Block& b, uint3 index, size_t number) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  b.index = index;
  b.fibers.resize(threads);
  b.warps.assign((threads + 31) / 32, {});
  b.shared.clear();
  b.waiting = b.sum = 0;
  b.left = threads;
  b.started = false;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.state = State::ready;
    f.fake_stack = nullptr;
    f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    f.arrived = false;
    f.copies.assign(1, {});
    f.context.prepare(stack_of(number * threads + i), kStackBytes - kPage, fiber_main);
  }
}

// Resumes threads of a block until all wait or have returned, or one fails; whether any ran.
bool run_block(Block& b) {
  const size_t threads = b.fibers.size();
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (size_t k = 0; k < threads; ++k) {
      const size_t i = order == Order::ascending ? k : threads - 1 - k;
      if (b.fibers[i].state != State::ready) continue;
      again = progress = true;
      resume(b, i);
      if (!error.empty()) return true;
      if (b.fibers[i].state == State::returned) --b.left;
    }
  }
  if (b.left == 0) b.shared.clear();
  return progress;
}

// first: the index of the cluster's block 0. A block goes on until it must wait for another: the
// blocks are as far apart as the barriers of the cluster allow.
void run_cluster(uint3 first) {
  const unsigned blocks = cluster.size();
  arrived = phase = 0;
  error.clear();
  for (unsigned i = 0; i < blocks; ++i)
    prepare_block(cluster[i], {first.x + i, first.y, first.z}, i);
  bool progress = true;
  while (progress && error.empty()) {
    progress = false;
    for (unsigned k = 0; k < blocks && error.empty(); ++k)
      progress |= run_block(cluster[order == Order::ascending ? k : blocks - 1 - k]);
  }
  const auto ended = [](const Block& b) { return b.left == 0; };
  if (error.empty() && std::all_of(cluster.begin(), cluster.end(), ended)) return;
  // The frames of abandoned fibers must not poison the next cluster's.
  for (size_t i = 0; i < blocks * cluster[0].fibers.size(); ++i)
    __asan_unpoison_memory_region(stack_of(i), kStackBytes - kPage);
  throw std::runtime_error(error.empty() ? deadlock() : error);
}

// The fiber waits until whoever completes the barrier or the meeting makes it ready.
void wait(State state, Place place) {
  Fiber& me = block->fibers[current];
  me.state = state;
  me.place = place;
  to_scheduler(false);
}

// The block's variable that holds [at, at + bytes): its place in Block::shared.
auto variable_at(const void* at, size_t bytes) {
  return std::find_if(block->shared.begin(), block->shared.end(), [&](const auto& entry) {
    const auto offset =
        reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(entry.second.at.get());
    return offset < entry.second.bytes && bytes <= entry.second.bytes - offset;
  });
}

}  // namespace

void run(dim3 grid, dim3 threads, unsigned blocks, size_t bytes,
         const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launching);
  gridDim = grid;
  blockDim = threads;
  dynamic_bytes = bytes;
  kernel_name = "?";
  kernel_body = &body;
  cluster.resize(blocks);
  const uint64_t across = grid.x / blocks;
  std::vector<uint64_t> turn(across * grid.y * grid.z);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), std::mt19937(turn.size()));
  for (const uint64_t c : turn) {
    run_cluster({static_cast<unsigned>(c % across * blocks),
                 static_cast<unsigned>(c / across % grid.y),
                 static_cast<unsigned>(c / across / grid.y)});
  }
}

void fail(const char* why, Place place) {
  error = where() + ", thread " + std::to_string(current) + ": " + text(place) + ": " + why;
  to_scheduler(false);
  std::abort();
}

void entered(const char* kernel) {
  if (kernel_name == kernel) return;
  kernel_name = kernel;
  kernels_run.insert(kernel);
}

void* shared(const void* site, size_t bytes) { return block->memory(site, bytes); }

void* dynamic_shared() { return block->memory(&dynamic_site, dynamic_bytes); }

int lane() { return current % 32; }

int barrier(Place place, int value) {
  if (block->waiting == 0) {
    block->barrier = place;
    block->sum = 0;
  } else if (block->barrier.line != place.line ||
             (block->barrier.file != place.file && std::strcmp(block->barrier.file, place.file))) {
    fail(("others of its block wait at " + text(block->barrier)).c_str(), place);
  }
  block->sum += value;
  if (++block->waiting < static_cast<int>(block->fibers.size())) {
    wait(State::at_barrier, place);
    return block->result;
  }
  block->waiting = 0;
  block->result = block->sum;
  for (Fiber& f : block->fibers) f.state = State::ready;
  return block->result;
}

unsigned cluster_size() { return cluster.size(); }
unsigned cluster_rank() { return block - cluster.data(); }

void arrive_at_cluster(Place place) {
  Fiber& me = block->fibers[current];
  if (me.arrived) fail("it arrives again and has not waited", place);
  me.arrived = true;
  me.phase = phase;
  if (++arrived < cluster.size() * block->fibers.size()) return;
  arrived = 0;
  ++phase;
  for (Block& b : cluster)
    for (Fiber& f : b.fibers)
      if (f.state == State::at_cluster_barrier) f.state = State::ready;
}

void wait_for_cluster(Place place) {
  Fiber& me = block->fibers[current];
  if (!me.arrived) fail("it waits and has not arrived", place);
  if (me.phase == phase) wait(State::at_cluster_barrier, place);
  me.arrived = false;
}

void* remote(Place place, const void* here, unsigned rank, size_t bytes) {
  if (rank >= cluster.size()) fail("its rank is not in the cluster", place);
  const auto found = variable_at(here, bytes);
  if (found == block->shared.end()) fail("its address is not in shared memory", place);
  Block& there = cluster[rank];
  if (!there.started) fail("that block has not started", place);
  if (there.left == 0) fail("that block has ended", place);
  const auto& [site, memory] = *found;
  return there.memory(site, memory.bytes) + (static_cast<const char*>(here) - memory.at.get());
}

void begin_copy(Place place, void* to_shared, const void* from) {
  if (variable_at(to_shared, 16) == block->shared.end())
    fail("its target is not in shared memory", place);
  std::memset(to_shared, kPoison, 16);
  block->fibers[current].copies.back().push_back({to_shared, from});
}

void close_copy_group() { block->fibers[current].copies.emplace_back(); }

void wait_for_copies(size_t open_groups) {
  auto& copies = block->fibers[current].copies;
  for (; copies.size() - 1 > open_groups; copies.pop_front())
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, 16);
}

Meeting& meet(Place place, unsigned mask, const void* value, size_t bytes) {
  const unsigned me = 1u << lane();
  if (!(mask & me)) fail("its mask does not hold its own lane", place);
  Warp& warp = block->warps[current / 32];
  Meeting* mine = nullptr;
  for (Meeting& m : warp.meetings)
    if (m.mask == mask && m.unread == 0) mine = &m;
  if (!mine) {
    // A meeting with mask 0 is over and free.
    for (Meeting& m : warp.meetings)
      if (m.mask == 0) mine = &m;
    if (!mine) mine = &warp.meetings.emplace_back();
    mine->mask = mask;
    mine->arrived = 0;
    mine->place = place;
  }
  if (mine->place.what != place.what && std::strcmp(mine->place.what, place.what) != 0)
    fail(("others of its warp wait at " + text(mine->place)).c_str(), place);
  std::memcpy(mine->brought[lane()], value, bytes);
  mine->arrived |= me;
  if (mine->arrived != mask) {
    wait(State::in_meeting, place);
    return *mine;
  }
  mine->unread = mask;
  const int first = current / 32 * 32;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) block->fibers[first + i].state = State::ready;
  return *mine;
}

void leave(Meeting& meeting) {
  meeting.unread &= ~(1u << lane());
  if (meeting.unread == 0) meeting.mask = 0;
}

}  // namespace shim

// For the tests: the names of the kernels that ran since the last call, one a line.
extern "C" __attribute__((visibility("default"))) const char* shim_kernels_run() {
  static std::string names;
  names.clear();
  for (const std::string& name : shim::kernels_run) names += name + "\n";
  shim::kernels_run.clear();
  return names.c_str();
}

// The last launch: kernel, blocks of a cluster, bytes of dynamic shared memory.
extern "C" __attribute__((visibility("default"))) const char* shim_last_launch() {
  static std::string launch;
  launch = std::string(shim::kernel_name) + " " + std::to_string(shim::cluster.size()) + " " +
           std::to_string(shim::dynamic_bytes);
  return launch.c_str();
}

// Stand-ins for what PyTorch offers on CUDA alone; linked before libtorch's own.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
int32_t aoti_torch_create_device_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
int32_t aoti_torch_device_guard_set_index(void*, int32_t) { return 0; }
}
