#include "fiber.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifndef __x86_64__
#error "The emulator's context switch is written for x86-64."
#endif

// Saves the callee's registers and the stack pointer in *from, and goes on where `to` was saved. swapcontext
// would do the same with two system calls, and a warning of AddressSanitizer.
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.type emu_switch, @function
emu_switch:
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
.size emu_switch, . - emu_switch
.type emu_begin, @function
emu_begin:
  movq %r12, %rdi
  callq *%r13
  ud2
.size emu_begin, . - emu_begin
)");
extern "C" void emu_begin();

// What a kernel that was stopped half-way held is not given back; leaks are no business of kernels.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

namespace emu {
namespace {
// Kernel arguments, up to 32 KiB, are copied to it; AddressSanitizer makes frames larger than they are on a
// device.
constexpr size_t kStackSize = 256 * 1024;
constexpr size_t kGuardSize = 4096;  // an overflow faults
}  // namespace

Fiber::Fiber() {
  void* memory =
      mmap(nullptr, kGuardSize + kStackSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory) + kGuardSize;
  if (mprotect(stack_, kStackSize, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

Fiber::~Fiber() {
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackSize);
  munmap(stack_ - kGuardSize, kGuardSize + kStackSize);
}

void Fiber::start(void (*entry)(void*), void* argument) {
  // The frames of a run that was given up are still marked on its stack.
  if (!finished_) ASAN_UNPOISON_MEMORY_REGION(stack_, kStackSize);
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackSize);
  *--top = 0;  // no caller: here a stack trace ends
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(&emu_begin);     // where `ret` goes
  *--top = 0;                                          // rbp
  *--top = 0;                                          // rbx
  *--top = reinterpret_cast<uint64_t>(this);           // r12
  *--top = reinterpret_cast<uint64_t>(&Fiber::begin);  // r13
  *--top = 0;                                          // r14
  *--top = 0;                                          // r15
  stack_pointer_ = top;
}

void Fiber::begin(Fiber* self) {
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_stack_size_);
  self->entry_(self->argument_);
  self->finished_ = true;
  __sanitizer_start_switch_fiber(nullptr, self->caller_stack_, self->caller_stack_size_);
  emu_switch(&self->stack_pointer_, self->caller_pointer_);
  std::abort();
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackSize);
  emu_switch(&caller_pointer_, stack_pointer_);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fiber::pause() {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, caller_stack_, caller_stack_size_);
  emu_switch(&stack_pointer_, caller_pointer_);
  __sanitizer_finish_switch_fiber(fake_stack, &caller_stack_, &caller_stack_size_);
}

}  // namespace emu
