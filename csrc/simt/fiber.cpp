#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gptkernels::simt {

void allocate_stack(Fiber& fiber) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void* memory =
        mmap(nullptr, page + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + page;
}

#if defined(__x86_64__)

// The registers that the System V ABI keeps over a call go to the old stack and come from the new one.
extern "C" void gptkernels_switch_stack(void** from, void* to);
asm(R"(
.text
.type gptkernels_switch_stack, @function
gptkernels_switch_stack:
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
    popq %rcx
    jmpq *%rcx
.size gptkernels_switch_stack, .-gptkernels_switch_stack
)");

void prepare(Fiber& fiber, void (*entry)()) {
    void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES);
    *--top = nullptr;  // entry's return address; it also leaves the stack as aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

static void switch_stack(Fiber& from, Fiber& to) { gptkernels_switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

static ucontext_t& context_of(Fiber& fiber) {
    if (!fiber.stack_pointer) fiber.stack_pointer = new ucontext_t;
    return *static_cast<ucontext_t*>(fiber.stack_pointer);
}

void prepare(Fiber& fiber, void (*entry)()) {
    ucontext_t& context = context_of(fiber);
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

static void switch_stack(Fiber& from, Fiber& to) { swapcontext(&context_of(from), &context_of(to)); }

#endif

#if defined(__SANITIZE_ADDRESS__)

// The stack of the operating system's thread that runs the launch, which has no Fiber::stack.
static const void* main_bottom;
static size_t main_size;

static void find_main_stack() {
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &main_size);
    pthread_attr_destroy(&attributes);
    main_bottom = bottom;
}

void switch_fiber(Fiber& from, Fiber& to, bool finished) {
    if (!from.stack) find_main_stack();
    __sanitizer_start_switch_fiber(finished ? nullptr : &from.sanitizer, to.stack ? to.stack : main_bottom,
                                   to.stack ? STACK_BYTES : main_size);
    switch_stack(from, to);
    __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
}

void entered(Fiber& fiber) { __sanitizer_finish_switch_fiber(fiber.sanitizer, nullptr, nullptr); }

#else

void switch_fiber(Fiber& from, Fiber& to, bool) { switch_stack(from, to); }
void entered(Fiber&) {}

#endif

}  // namespace gptkernels::simt
