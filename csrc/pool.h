// Threads that share out numbered tasks. Knows no arithmetic.
//
// Tasks are claimed one by one, so a thread whose core is taken away costs the others only the task
// it holds. Waiting spins for a short while and then sleeps: a sleeping thread frees its core for
// the very thread that is waited for, which engines that spin at barriers never do.
#pragma once

#include <cstdint>

namespace moesaic {

using Task = void (*)(void* context, int64_t index, int worker);

// Run task(context, i, worker) for 0 <= i < count and return when all are done. Workers are numbered
// from 0 (the caller) up to threads() - 1. The caller holds a Turn.
void run(int64_t count, Task task, void* context);

template <class F>
void run(int64_t count, const F& body) {
    const Task task = [](void* f, int64_t index, int worker) { (*static_cast<const F*>(f))(index, worker); };
    run(count, task, const_cast<F*>(&body));
}

// The right to the threads and the scratch memory: one op at a time, a second caller waits.
class Turn {
  public:
    Turn();
    ~Turn();
};

int threads();

// Set the number of threads, the caller included; 1 <= count <= 1024. The caller holds a Turn.
void set_threads(int count);

// Memory that stays where it is until a larger piece is asked for under the same number; 64-aligned.
// Numbers from 16 on are the workers' own. It is not given back, as the next op needs it again.
uint8_t* scratch(int number, int64_t bytes);

}  // namespace moesaic
