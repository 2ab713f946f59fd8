#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moesaic {
namespace {

using Clock = std::chrono::steady_clock;

// About the time that Python needs between two ops. Spinning longer would only take the core from others.
constexpr auto SPIN = std::chrono::microseconds(150);
constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr uint32_t GATE_CLOSED = 1u << 31;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Spin until done() is true, for at most SPIN. Return done().
template <class F>
bool spin(F done) {
    const auto until = Clock::now() + SPIN;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            pause();
        }
    } while (Clock::now() < until);
    return done();
}

class Pool {
  public:
    explicit Pool(int count) {
        for (int worker = 1; worker < count; ++worker) helpers_.emplace_back([this, worker] { worker_loop(worker); });
    }

    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            ending_ = true;
        }
        task_ready_.notify_all();
        for (auto& helper : helpers_) helper.join();
    }

    int count() const { return int(helpers_.size()) + 1; }

    void parallel_for(int64_t count, Task task, void* context) {
        task_ = task;
        context_ = context;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        // Open the gate. A helper that is late for the previous run may still be counted, so this cannot be a plain store.
        inside_.fetch_and(~GATE_CLOSED, std::memory_order_acq_rel);
        {
            // A helper decides to sleep under this lock, so it cannot miss the new epoch.
            std::lock_guard lock(mutex_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load(std::memory_order_relaxed) > 0) task_ready_.notify_all();
        work(0);
        const uint32_t before = inside_.fetch_or(GATE_CLOSED, std::memory_order_acq_rel);
        if (before == 0) return;  // no helper entered the gate, so there is none to wait for
        const auto empty = [this] { return inside_.load(std::memory_order_acquire) == GATE_CLOSED; };
        if (spin(empty)) return;
        std::unique_lock lock(mutex_);
        task_done_.wait(lock, empty);
    }

  private:
    void work(int worker) {
        for (;;) {
            const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
            if (index >= count_) return;
            task_(context_, index, worker);
        }
    }

    void worker_loop(int worker) {
        uint64_t seen = 0;
        for (;;) {
            const auto news = [&] { return epoch_.load(std::memory_order_acquire) != seen || ending_.load(); };
            if (!spin(news)) {
                std::unique_lock lock(mutex_);
                sleeping_.fetch_add(1);
                task_ready_.wait(lock, news);
                sleeping_.fetch_sub(1);
            }
            if (ending_.load()) return;
            seen = epoch_.load(std::memory_order_acquire);
            if (!(inside_.fetch_add(1, std::memory_order_acq_rel) & GATE_CLOSED)) work(worker);
            if (inside_.fetch_sub(1, std::memory_order_acq_rel) == (GATE_CLOSED | 1)) {
                std::lock_guard lock(mutex_);
                task_done_.notify_one();
            }
        }
    }

    Task task_ = nullptr;
    void* context_ = nullptr;
    int64_t count_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    // Number of helpers that run tasks; the bit GATE_CLOSED is set when no more may enter.
    alignas(64) std::atomic<uint32_t> inside_{GATE_CLOSED};
    alignas(64) std::atomic<uint64_t> epoch_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> ending_{false};
    std::mutex mutex_;
    std::condition_variable task_ready_, task_done_;
    std::vector<std::thread> helpers_;
};

std::mutex op_mutex;
Pool* pool = nullptr;

// Threads do not survive a fork. The child starts its own when it needs them.
void after_fork() {
    pool = nullptr;
    new (&op_mutex) std::mutex;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork);

Pool& current_pool() {
    if (!pool) pool = new Pool(std::clamp(int(std::thread::hardware_concurrency()), 1, 1024));
    return *pool;
}

}  // namespace

OpLock::OpLock() { op_mutex.lock(); }
OpLock::~OpLock() { op_mutex.unlock(); }

void parallel_for(int64_t count, Task task, void* context) {
    if (count == 1) {
        task(context, 0, 0);
    } else if (count > 1) {
        current_pool().parallel_for(count, task, context);
    }
}

int threads() { return current_pool().count(); }

void set_threads(int count) {
    if (pool && pool->count() == count) return;
    delete pool;
    pool = new Pool(count);
}

uint8_t* scratch(int number, int64_t bytes) {
    static struct { uint8_t* memory; int64_t bytes; } slots[16 + 1024];
    auto& slot = slots[number];
    if (slot.bytes < bytes) {
        std::free(slot.memory);
        const int64_t page = bytes > HUGE_PAGE / 4 ? HUGE_PAGE : 4096, size = (bytes + bytes / 4 + page - 1) / page * page;
        slot.memory = static_cast<uint8_t*>(std::aligned_alloc(page, size));
        if (!slot.memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (page == HUGE_PAGE) madvise(slot.memory, size, MADV_HUGEPAGE);  // avoids TLB misses: many places are read at once
#endif
        slot.bytes = size;
    }
    return slot.memory;
}

}  // namespace moesaic
