#include "simulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

// Weak, so that one object file serves plain programs (all null) and those linked with a sanitizer. This file and
// simulator.cpp are never instrumented themselves: their state is shared by all fibers on purpose.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom_old, size_t* size_old);
[[gnu::weak]] void __asan_poison_memory_region(void const volatile* p, size_t size);
[[gnu::weak]] void __asan_unpoison_memory_region(void const volatile* p, size_t size);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* p);
[[gnu::weak]] void __tsan_release(void* p);
}

#ifdef __x86_64__
// Saves the callee-saved registers on the stack that is left and restores those of the stack that is entered: 8 ns a
// switch, where swapcontext needs 265 for its system call.
extern "C" void calm_rt_switch_stack(void** save, void* restore);
asm(R"(
.text
.p2align 4
.type calm_rt_switch_stack, @function
calm_rt_switch_stack:
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
.size calm_rt_switch_stack, . - calm_rt_switch_stack
)");
#else
#error "the simulator switches stacks on x86-64 only"
#endif

namespace calm_rt::simulator {

constexpr size_t kStackSize = 128 << 10;  // sanitized frames are several times the size of plain ones
constexpr unsigned kTsanNoSync = 1;       // a switch is no synchronisation, only barriers are

Fiber::~Fiber() {
  if (!owned_) return;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(stack_ - page, kStackSize + page);
  if (__tsan_destroy_fiber) __tsan_destroy_fiber(tsan_fiber_);
}

void Fiber::adopt_current() {
  if (__tsan_get_current_fiber) tsan_fiber_ = __tsan_get_current_fiber();
}

void Fiber::prepare(void (*entry)()) {
  if (!owned_) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory =
        mmap(nullptr, kStackSize + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    stack_ = static_cast<char*>(memory) + page;
    stack_size_ = kStackSize;
    owned_ = true;
    if (__tsan_create_fiber) tsan_fiber_ = __tsan_create_fiber(0);  // kept: making one costs 0.4 ms
  }
  unpoison(stack_, stack_size_);  // frames that a failed launch abandoned
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack_ + stack_size_ - 64);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& from, Fiber& to, bool done) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(done ? nullptr : &from.asan_fake_stack_, to.stack_, to.stack_size_);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_fiber_, kTsanNoSync);
  calm_rt_switch_stack(&from.stack_pointer_, to.stack_pointer_);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.asan_fake_stack_, nullptr, nullptr);
}

void Fiber::entered(Fiber& from) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!from.owned_) {  // the OS thread's stack, which only the sanitizer knows
    from.stack_ = static_cast<char*>(const_cast<void*>(bottom));
    from.stack_size_ = size;
  }
}

void release(void* p) {
  if (__tsan_release) __tsan_release(p);
}
void acquire(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
void poison(void* p, size_t size) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, size);
}
void unpoison(void* p, size_t size) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, size);
}

}  // namespace calm_rt::simulator
