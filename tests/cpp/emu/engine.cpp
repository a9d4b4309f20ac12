#include "engine.h"

#include <link.h>
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iomanip>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "cuda_runtime.h"
#include "fiber.h"

// Dynamic shared memory: a kernel declares `extern __shared__ unsigned char dynamic_shared[];`.
namespace torchqat::cuda {
alignas(16) thread_local unsigned char dynamic_shared[emu::kDynamicSharedSize];
}

namespace emu {
namespace {

using torchqat::cuda::dynamic_shared;

enum class State { ready, at_barrier, at_warp_call };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Site site;
  bool predicate;
  WarpCall call;
};

std::vector<std::unique_ptr<Thread>> threads;  // of the block that runs, by linear index
std::vector<std::unique_ptr<Thread>> spare;    // stacks are worth keeping from launch to launch
unsigned holding = 0;                          // predicates at the last barrier
Thread* running = nullptr;                     // null between launches
const std::function<void()>* body = nullptr;
std::optional<Error> failure;

std::string text(const Site& site) {
  std::ostringstream out;
  out << site.file << ":" << site.line;
  return out.str();
}

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::vector<unsigned> order_of(unsigned n, unsigned of) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0U);
  if (world.order == Order::descending) std::reverse(order.begin(), order.end());
  if (world.order == Order::shuffled)
    std::shuffle(order.begin(), order.end(), std::mt19937(0x9E3779B9U * world.seed + of));
  return order;
}

// Variables marked __shared__ are thread_local, and nothing else in a test program is: they are this
// program's thread-local storage, templates' included (g++ ignores a section attribute in a template).
struct Storage {
  void* begin = nullptr;
  size_t size = 0;
};

int find_storage(dl_phdr_info* program, size_t, void* found) {  // the program itself is visited first
  for (int i = 0; i < program->dlpi_phnum; ++i) {
    if (program->dlpi_phdr[i].p_type != PT_TLS) continue;
    *static_cast<Storage*>(found) = {program->dlpi_tls_data, program->dlpi_phdr[i].p_memsz};
  }
  return 1;
}

void poison_shared(size_t dynamic_size) {
  static const Storage storage = [] {
    Storage found;
    dl_iterate_phdr(find_storage, &found);
    return found;
  }();
  ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, sizeof(dynamic_shared));
  std::memset(storage.begin, world.poison, storage.size);
  ASAN_POISON_MEMORY_REGION(dynamic_shared + dynamic_size, sizeof(dynamic_shared) - dynamic_size);
}

void run_thread(void*) {
  try {
    (*body)();
  } catch (const Error& error) {
    failure = error;
  }
}

// Opens a barrier at which every thread of the block waits; false where they do not. Threads that have
// returned do not count as arrived.
bool open_barrier() {
  for (const auto& thread : threads) {
    if (thread->fiber.finished() || thread->state != State::at_barrier) return false;
    if (!same(thread->site, threads[0]->site)) return false;
  }
  holding = 0;
  for (const auto& thread : threads) {
    holding += thread->predicate;
    thread->state = State::ready;
  }
  return true;
}

Thread* lane_of(const Thread* thread, unsigned lane) {
  const unsigned linear = thread->index.x + blockDim.x * (thread->index.y + blockDim.y * thread->index.z);
  const unsigned wanted = linear / kWarpSize * kWarpSize + lane;
  return wanted < threads.size() ? threads[wanted].get() : nullptr;
}

// The last of the lanes to arrive computes what each of them gets.
void complete_warp_call() {
  const WarpCall& mine = running->call;
  uint64_t ballot = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(mine.mask >> lane & 1)) continue;
    const Thread* other = lane_of(running, lane);
    if (other == nullptr || other->fiber.finished())
      fail("a warp call names a lane that is not there", mine.site);
    if (other->state != State::at_warp_call || !same(other->call.site, mine.site)) return;
    if (other->call.mask != mine.mask) fail("lanes of one warp call give different masks", mine.site);
    ballot |= uint64_t{other->call.value != 0} << lane;
  }
  if (mine.kind == WarpCall::Kind::together) {
    void* of_lanes[kWarpSize] = {};
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (mine.mask >> lane & 1) of_lanes[lane] = lane_of(running, lane)->call.own;
    }
    (*mine.work)(of_lanes);
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(mine.mask >> lane & 1)) continue;
    Thread* other = lane_of(running, lane);
    if (other->call.kind == WarpCall::Kind::ballot) other->call.result = ballot;
    if (other->call.kind == WarpCall::Kind::shuffle) {
      if (!(mine.mask >> other->call.source & 1))
        fail("a shuffle reads a lane outside of its mask", mine.site);
      other->call.result = lane_of(running, other->call.source)->call.value;
    }
    other->state = State::ready;
  }
}

[[noreturn]] void fail_divergent() {
  std::map<std::string, unsigned> groups;
  for (const auto& thread : threads) {
    const bool at_barrier = thread->state == State::at_barrier;
    groups[thread->fiber.finished() ? "have returned"
           : at_barrier             ? "wait for the block at " + text(thread->site)
                                    : "wait for their warp at " + text(thread->call.site)]++;
  }
  std::ostringstream out;
  out << "divergent barrier:";
  for (const auto& [where, count] : groups) out << "\n  " << count << " threads " << where;
  throw Error(out.str());
}

// Lets each of these threads that can move do so; false when none could.
bool pass(std::span<const unsigned> order) {
  bool moved = false;
  for (const unsigned i : order) {
    Thread& thread = *threads[i];
    if (thread.fiber.finished() || thread.state != State::ready) continue;
    running = &thread;
    threadIdx = thread.index;
    thread.fiber.resume();
    moved = true;
    if (failure) throw Error(*failure);
  }
  return moved;
}

// All threads go on until they wait for the block. Warps keep step with each other where the order is
// shuffled; else each comes as far as it can before the next one begins.
void run_to_barrier(std::span<const unsigned> order) {
  const size_t together = world.order == Order::shuffled ? order.size() : kWarpSize;
  bool moved = true;
  while (moved) {  // once more where a block is no whole number of warps
    moved = false;
    for (size_t begin = 0; begin < order.size(); begin += together) {
      while (pass(order.subspan(begin, std::min(together, order.size() - begin)))) moved = true;
    }
  }
}

void run_block(size_t dynamic_shared_size, unsigned block) {
  poison_shared(dynamic_shared_size);
  for (const auto& thread : threads) {
    thread->state = State::ready;
    thread->fiber.start(run_thread, nullptr);
  }
  const auto order = order_of(static_cast<unsigned>(threads.size()), block);
  do {
    run_to_barrier(order);
  } while (open_barrier());
  for (const auto& thread : threads) {
    if (!thread->fiber.finished()) fail_divergent();
  }
}

void resize_block(dim3 block) {
  const size_t size = size_t{block.x} * block.y * block.z;
  while (threads.size() > size) {
    spare.push_back(std::move(threads.back()));
    threads.pop_back();
  }
  while (threads.size() < size) {
    if (spare.empty()) spare.push_back(std::make_unique<Thread>());
    threads.push_back(std::move(spare.back()));
    spare.pop_back();
  }
  for (unsigned i = 0; i < size; ++i) {
    threads[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_size, const std::function<void()>& thread_body) {
  launches.push_back({grid, block});
  resize_block(block);
  gridDim = grid;
  blockDim = block;
  body = &thread_body;
  failure.reset();
  struct Finally {
    ~Finally() { running = nullptr; }
  } finally;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (const unsigned i : order_of(blocks, blocks)) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(dynamic_shared_size, i);
  }
}

std::string name_of(const World& world) {
  std::ostringstream out;
  out << "poison 0x" << std::hex << std::uppercase << std::setw(2) << std::setfill('0') << int{world.poison}
      << ", " << std::dec;
  if (world.order == Order::ascending) out << "ascending";
  if (world.order == Order::descending) out << "descending";
  if (world.order == Order::shuffled) out << "shuffled (TORCHQAT_EMU_SEED=" << world.seed << ")";
  return out.str();
}

unsigned first_seed() {
  const char* const text = std::getenv("TORCHQAT_EMU_SEED");
  if (text == nullptr) return 1;
  const std::string_view digits(text);
  unsigned seed = 0;
  const auto [end, error] = std::from_chars(digits.begin(), digits.end(), seed);
  if (error != std::errc() || end != digits.end())
    throw std::invalid_argument("TORCHQAT_EMU_SEED must be a number from 0 to 4294967295, got '" +
                                std::string(digits) + "'");
  return seed;
}

unsigned block_barrier(Site site, bool predicate) {
  running->site = site;
  running->predicate = predicate;
  running->state = State::at_barrier;
  running->fiber.pause();
  return holding;
}

uint64_t warp_call(const WarpCall& call) {
  running->call = call;
  if (!(call.mask >> (linear_thread() % kWarpSize) & 1))
    fail("the mask of a warp call leaves out its caller", call.site);
  running->state = State::at_warp_call;
  complete_warp_call();
  if (running->state != State::ready) running->fiber.pause();
  return running->call.result;
}

void fail(const std::string& what, const Site& site) {
  std::ostringstream out;
  out << text(site) << ": " << what << " (thread " << linear_thread() << " of block " << blockIdx.x << ", "
      << blockIdx.y << ", " << blockIdx.z << ")";
  throw Error(out.str());
}

unsigned linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

unsigned block_size() { return blockDim.x * blockDim.y * blockDim.z; }

}  // namespace emu

// The sanitizers call these with an error of theirs, before they end the program.
namespace {
void name_world() {
  if (emu::running != nullptr) std::fprintf(stderr, "emulated with %s\n", emu::name_of(emu::world).c_str());
}
}  // namespace
extern "C" void __asan_on_error() { name_world(); }
extern "C" void __ubsan_on_report() { name_world(); }
