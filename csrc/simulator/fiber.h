// Fibers: stacks that one OS thread switches between, known to AddressSanitizer and ThreadSanitizer where a program
// links them.
#pragma once
#include <cstddef>

namespace calm_rt::simulator {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber enters `entry` on a fresh stack; entry must not return.
  void prepare(void (*entry)());

  // Leaves `from`, which is running, and continues `to`; returns when something switches back. A fiber that is `done`
  // is not switched back to before it is prepared again.
  static void switch_to(Fiber& from, Fiber& to, bool done = false);

  // First thing to call in `entry`, which knows where it came from.
  static void entered(Fiber& from);

  // A fiber for the stack that is running now.
  void adopt_current();

 private:
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;  // lowest address; a page below it faults
  size_t stack_size_ = 0;
  void* asan_fake_stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
  bool owned_ = false;
};

// Happens-before edges for ThreadSanitizer: what a fiber did before release(p) is visible after another one's
// acquire(p).
void release(void* p);
void acquire(void* p);

// For AddressSanitizer: touching poisoned bytes is an error.
void poison(void* p, size_t size);
void unpoison(void* p, size_t size);

}  // namespace calm_rt::simulator
