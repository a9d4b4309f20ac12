#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "vector_types.h"

// Runs the blocks of a grid one after the other, and the threads of a block as fibers. Whatever a device
// leaves open (the order of blocks and threads, what shared memory holds at first) is chosen by `world`.
//
// Not found here: races that no order of whole threads between barriers brings out; what depends on blocks
// that run at the same time; and writes past a __shared__ variable through a pointer (by index they are
// found).
namespace emu {

constexpr unsigned kWarpSize = 32;
constexpr size_t kDynamicSharedSize = 48 * 1024;

enum class Order { ascending, descending, shuffled };

struct World {
  uint8_t poison = 0xFF;  // every byte of memory that nobody wrote
  Order order = Order::ascending;
  unsigned seed = 1;  // of a shuffled order
};
inline World world;

// "poison 0xFF, shuffled (TORCHQAT_EMU_SEED=1)". Every error names the world in which it came about.
std::string name_of(const World& world);

// The environment variable TORCHQAT_EMU_SEED, or 1: the seed from which tests take those of their worlds.
unsigned first_seed();

// A kernel did what a device does not allow. Reaches the test as an exception out of the launch.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& what) : std::runtime_error(what + "\n  with " + name_of(world)) {}
};

// Where in a kernel threads meet. (std::source_location needs clang 16.)
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& thread_body);

// The launches since the last clear(), for tests of how many there are and of what size.
struct Launch {
  dim3 grid, block;
};
inline std::vector<Launch> launches;

// All kernels that were launched since the program began.
inline std::set<const void*> kernels;

// __syncthreads, called by the fiber that runs. Returns how many threads of the block gave a predicate that
// holds.
unsigned block_barrier(Site site, bool predicate = false);

// What the lanes named in `mask` do together: each brings a value, and gets `result`.
struct WarpCall {
  enum class Kind { sync, shuffle, ballot, together };
  Kind kind;
  Site site;
  unsigned mask;
  uint64_t value = 0;
  unsigned source = 0;  // shuffle: the lane whose value is the result
  uint64_t result = 0;
  // together: what is done once, when all lanes are there, with a pointer that each of them brings.
  const std::function<void(void* const* of_lanes)>* work = nullptr;
  void* own = nullptr;
};
uint64_t warp_call(const WarpCall& call);

// Ends the run of the grid with an Error that names the place and the thread.
[[noreturn]] void fail(const std::string& what, const Site& site);

unsigned linear_thread();  // within the block
unsigned block_size();

}  // namespace emu
