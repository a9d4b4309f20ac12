#pragma once

#include <cstddef>

namespace emu {

// A function on a stack of its own that can pause in the middle: one CUDA thread of the block that runs.
// There is no parallelism: `resume` runs it on the caller's thread until it pauses or returns.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Sets it up to run entry(argument) at the next resume. What it did before, finished or not, is forgotten.
  void start(void (*entry)(void*), void* argument);
  void resume();
  void pause();  // called on the fiber itself
  bool finished() const { return finished_; }

 private:
  static void begin(Fiber* self);

  char* stack_;  // lowest address
  void* stack_pointer_ = nullptr;
  void* caller_pointer_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
  const void* caller_stack_ = nullptr;  // AddressSanitizer must know which stack is in use
  size_t caller_stack_size_ = 0;
};

}  // namespace emu
