// Switching between the stacks of fibers.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

namespace emu {

using Context = void*;

// Saves what a function must keep, and the stack pointer; the counterpart of what `prepare` lays out.
extern "C" void emu_switch(Context* from, Context to);
asm(R"(.text
.local emu_switch
.type emu_switch,@function
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
)");

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = 0;  // the return address of `entry`, which never returns
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = 0;
  context = top;
}

inline void change(Context& from, Context& to) { emu_switch(&from, to); }

}  // namespace emu

#else

#include <ucontext.h>

namespace emu {

using Context = ucontext_t;

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

inline void change(Context& from, Context& to) { swapcontext(&from, &to); }

}  // namespace emu

#endif
