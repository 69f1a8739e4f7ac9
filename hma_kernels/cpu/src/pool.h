// The threads that all kernels of a process share.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace hma {

// OMP_NUM_THREADS threads, else one a usable core; the caller is one of them. Idle threads sleep.
// Calls from several threads take turns. A forked child starts its own threads.
class Pool {
  public:
    static Pool& instance();

    int threads() const { return threads_; }
    void resize(int threads);

    // Serializes use of the pool; hold it from reserve() to the end of the last run().
    std::unique_lock<std::mutex> lock() { return std::unique_lock(turn_); }

    // At least `bytes` of 64-byte aligned scratch for each thread. Throws std::bad_alloc.
    void reserve(int64_t bytes);

    // task(index, scratch) for 0 <= index < count, each once, in about this order.
    template <class Task>
    void run(int64_t count, const Task& task) {
        run_erased(count, &task, [](const void* erased, int64_t index, void* scratch) {
            (*static_cast<const Task*>(erased))(index, scratch);
        });
    }

  private:
    using Call = void (*)(const void*, int64_t, void*);
    struct Aligned { void operator()(void* memory) const; };

    explicit Pool(int threads) : threads_(threads), scratch_(threads) {}
    void run_erased(int64_t count, const void* task, Call call);
    void start();
    void stop();
    void work(int thread, uint32_t first_round);
    void take_tasks(int thread);

    std::mutex turn_;
    int threads_;
    int64_t reserved_ = 0;
    std::vector<std::unique_ptr<void, Aligned>> scratch_;
    std::vector<std::thread> workers_;
    bool stopping_ = false;

    const void* task_ = nullptr;
    Call call_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<uint32_t> round_{0};
    std::atomic<int> busy_{0};
};

}  // namespace hma
