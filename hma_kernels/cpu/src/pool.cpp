#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

namespace hma {
namespace {

int default_threads() {
    if (const char* setting = std::getenv("OMP_NUM_THREADS")) {
        const int threads = std::atoi(setting);
        if (threads > 0) return threads;
    }
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof usable, &usable) == 0) return CPU_COUNT(&usable);
    return int(std::thread::hardware_concurrency());
}

}  // namespace

void Pool::Aligned::operator()(void* memory) const {
    ::operator delete(memory, std::align_val_t(64));
}

Pool& Pool::instance() {
    static std::mutex creation;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    const std::lock_guard guard(creation);
    if (owner != getpid()) {
        // The parent's threads do not exist here; its pool is left as it lies.
        pool = new Pool(default_threads());
        owner = getpid();
    }
    return *pool;
}

void Pool::resize(int threads) {
    const auto guard = lock();
    stop();
    threads_ = threads;
    scratch_.clear();
    scratch_.resize(threads);
    reserved_ = 0;
}

void Pool::reserve(int64_t bytes) {
    if (bytes <= reserved_) return;
    reserved_ = 0;
    for (auto& memory : scratch_) memory.reset(::operator new(bytes, std::align_val_t(64)));
    reserved_ = bytes;
}

void Pool::run_erased(int64_t count, const void* task, Call call) {
    if (count <= 0) return;
    task_ = task;
    call_ = call;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    if (count == 1 || threads_ == 1) {
        take_tasks(0);
        return;
    }
    if (workers_.empty()) start();
    busy_.store(int(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    take_tasks(0);
    for (int busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(busy);
}

void Pool::start() {
    for (int thread = 1; thread < threads_; thread++)
        workers_.emplace_back([this, thread, round = round_.load()] { work(thread, round); });
}

void Pool::stop() {
    stopping_ = true;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
}

void Pool::work(int thread, uint32_t first_round) {
    // Every round is seen: run() waits for all workers before it starts another.
    for (uint32_t seen = first_round;;) {
        round_.wait(seen, std::memory_order_acquire);
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (round == seen) continue;
        seen = round;
        if (stopping_) return;
        take_tasks(thread);
        if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
}

void Pool::take_tasks(int thread) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
        call_(task_, i, scratch_[thread].get());
}

}  // namespace hma
