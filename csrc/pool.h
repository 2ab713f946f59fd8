// A thread pool that runs numbered tasks.
//
// Threads claim tasks one at a time, so a preempted thread delays the others by at most one task. A waiting thread
// spins for a short time and then sleeps, which frees its core for the thread that it waits for.
#pragma once

#include <cstdint>

namespace moesaic {

using Task = void (*)(void* context, int64_t index, int worker);

// Run task(context, i, worker) for 0 <= i < count and return when all are done. The caller is worker 0; the others are
// numbered up to threads() - 1. The caller must hold an OpLock.
void parallel_for(int64_t count, Task task, void* context);

template <class F>
void parallel_for(int64_t count, const F& body) {
    const Task task = [](void* f, int64_t index, int worker) { (*static_cast<const F*>(f))(index, worker); };
    parallel_for(count, task, const_cast<F*>(&body));
}

constexpr int64_t SERIAL_BELOW = 1 << 19;  // multiplications below which waking a thread does not pay
constexpr int64_t COST_PER_VALUE = 32;     // cost of reading and writing a value, in multiplications

// Run the tasks in parallel, or in the calling thread if their total cost is small.
template <class Body>
void parallel_for_or_inline(int64_t count, int64_t multiplications, Body&& body) {
    if (multiplications <= SERIAL_BELOW) {
        for (int64_t i = 0; i < count; ++i) body(i, 0);
    } else {
        parallel_for(count, body);
    }
}

// Exclusive use of the threads and the scratch memory: one op runs at a time, and a second caller waits.
class OpLock {
  public:
    OpLock();
    ~OpLock();
};

int threads();

// Set the number of threads, including the caller; 1 <= count <= 1024. The caller must hold an OpLock.
void set_threads(int count);

// Return at least `bytes` bytes of scratch memory, aligned to 64 bytes. The memory stays valid until a larger size is
// requested under the same number. Number 16 + w belongs to worker w. Memory is never freed: the next op reuses it.
uint8_t* scratch(int number, int64_t bytes);

}  // namespace moesaic
