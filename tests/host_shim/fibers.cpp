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

constexpr size_t kStackBytes = 128 << 10, kPage = 4096, kMostThreads = 1024;
constexpr int kPoison = 0xff;  // NaN in every float type, -1 in every integer

enum class State { ready, at_barrier, in_meeting, returned };

struct Fiber {
  Context context;
  State state;
  Place place;
  uint3 index;
  void* fake_stack;
};

struct Warp {
  std::deque<Meeting> meetings;  // references stay valid
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;
  std::unique_ptr<char[]> dynamic;
  size_t dynamic_bytes = 0;
  int waiting = 0, sum = 0, result = 0;
  Place barrier{};
  int current = 0;
  std::string error;
};

std::mutex launching;
Block block;
const std::function<void()>* kernel_body;
std::set<std::string> kernels_run;
const char* kernel_name = "?";
Context scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

char* stack_of(int thread) {
  // One mapping for all stacks, a guard page below each; untouched pages cost nothing.
  static char* const all = [] {
    const size_t bytes = kMostThreads * kStackBytes;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) std::abort();
    for (size_t i = 0; i < kMostThreads; ++i)
      mprotect(static_cast<char*>(at) + i * kStackBytes, kPage, PROT_NONE);
    return static_cast<char*>(at);
  }();
  return all + thread * kStackBytes + kPage;
}

void to_scheduler(bool for_good) {
  Fiber& me = block.fibers[block.current];
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  Context::swap(me.context, scheduler);
  __sanitizer_finish_switch_fiber(me.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel_body)();
  block.fibers[block.current].state = State::returned;
  to_scheduler(true);
  std::abort();
}

void resume(int thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  threadIdx = fiber.index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_of(thread), kStackBytes - kPage);
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
  std::map<std::string, std::vector<int>> groups;
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    const Fiber& f = block.fibers[i];
    groups[f.state == State::returned ? "returned" : "wait at " + text(f.place)].push_back(i);
  }
  std::string message = where() + ": the threads of the block diverge:";
  for (const auto& [what, threads] : groups)
    message += " " + std::to_string(threads.size()) + " " + what + ", the first is thread " +
               std::to_string(threads.front()) + ";";
  return message;
}

void run_block(const std::function<void()>& body) {
  kernel_body = &body;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  block.fibers.resize(threads);
  block.warps.assign((threads + 31) / 32, {});
  block.shared.clear();
  block.dynamic.reset(new char[block.dynamic_bytes]);
  std::memset(block.dynamic.get(), kPoison, block.dynamic_bytes);
  block.waiting = block.sum = 0;
  block.error.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    f.state = State::ready;
    f.fake_stack = nullptr;
    const unsigned u = i;
    f.index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
    f.context.prepare(stack_of(i), kStackBytes - kPage, fiber_main);
  }
  for (int left = threads; left > 0;) {
    bool progress = false;
    for (int k = 0; k < threads; ++k) {
      const int i = order == Order::ascending ? k : threads - 1 - k;
      if (block.fibers[i].state != State::ready) continue;
      progress = true;
      resume(i);
      if (block.error.empty() && block.fibers[i].state == State::returned) --left;
      if (!block.error.empty()) break;
    }
    if (block.error.empty() && (progress || left == 0)) continue;
    // The frames of abandoned fibers must not poison the next block's.
    for (int i = 0; i < threads; ++i)
      __asan_unpoison_memory_region(stack_of(i), kStackBytes - kPage);
    throw std::runtime_error(block.error.empty() ? deadlock() : block.error);
  }
  block.shared.clear();
  block.dynamic.reset();
}

// The fiber waits until whoever completes the barrier or the meeting makes it ready.
void wait(State state, Place place) {
  Fiber& me = block.fibers[block.current];
  me.state = state;
  me.place = place;
  to_scheduler(false);
}

}  // namespace

void run(dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launching);
  gridDim = grid;
  blockDim = threads;
  block.dynamic_bytes = dynamic_bytes;
  kernel_name = "?";
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> turn(blocks);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), std::mt19937(blocks));
  for (const uint64_t b : turn) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(body);
  }
}

void fail(const char* why, Place place) {
  block.error =
      where() + ", thread " + std::to_string(block.current) + ": " + text(place) + ": " + why;
  to_scheduler(false);
  std::abort();
}

void entered(const char* kernel) {
  if (kernel_name == kernel) return;
  kernel_name = kernel;
  kernels_run.insert(kernel);
}

void* shared(const void* site, size_t bytes) {
  auto& storage = block.shared[site];
  if (!storage) {
    storage.reset(new char[bytes]);  // aligned to 16 bytes
    std::memset(storage.get(), kPoison, bytes);
  }
  return storage.get();
}

void* dynamic_shared() { return block.dynamic.get(); }

int lane() { return block.current % 32; }

int barrier(Place place, int value) {
  if (block.waiting == 0) {
    block.barrier = place;
    block.sum = 0;
  } else if (block.barrier.line != place.line ||
             (block.barrier.file != place.file && std::strcmp(block.barrier.file, place.file))) {
    fail(("others of its block wait at " + text(block.barrier)).c_str(), place);
  }
  block.sum += value;
  if (++block.waiting < static_cast<int>(block.fibers.size())) {
    wait(State::at_barrier, place);
    return block.result;
  }
  block.waiting = 0;
  block.result = block.sum;
  for (Fiber& f : block.fibers) f.state = State::ready;
  return block.result;
}

Meeting& meet(Place place, unsigned mask, const void* value, size_t bytes) {
  const unsigned me = 1u << lane();
  if (!(mask & me)) fail("its mask does not hold its own lane", place);
  Warp& warp = block.warps[block.current / 32];
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
  const int first = block.current / 32 * 32;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) block.fibers[first + i].state = State::ready;
  return *mine;
}

void leave(Meeting& meeting) {
  meeting.unread &= ~(1u << lane());
  if (meeting.unread == 0) meeting.mask = 0;
}

}  // namespace shim

// For the tests: the names of the kernels that ran, one a line.
extern "C" __attribute__((visibility("default"))) const char* shim_kernels_run() {
  static std::string names;
  names.clear();
  for (const std::string& name : shim::kernels_run) names += name + "\n";
  return names.c_str();
}

// Stand-ins for what PyTorch offers on CUDA alone; linked before libtorch's own.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
int32_t aoti_torch_create_device_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
int32_t aoti_torch_device_guard_set_index(void*, int32_t) { return 0; }
}
