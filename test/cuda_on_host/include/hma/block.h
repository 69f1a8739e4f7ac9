// One thread block at a time on the host: every thread is a coroutine that runs until it waits at a
// barrier. Between barriers the threads of a warp run one after another, so that a missing barrier
// gives a wrong result.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace hma {
constexpr int WARP_SIZE = 32;
}

namespace hma::on_host {

inline void check(bool good, const char* what) {
  if (!good) throw std::runtime_error(what);
}

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  bool valid;
};

struct Barrier {
  int threads = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) uint8_t slots[2][WARP_SIZE][64];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  unsigned gathered = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

class Block {
 public:
  static constexpr size_t STACK = 1 << 18;

  Block(int x, int blocks, int threads, int shared_bytes, std::function<void()> kernel)
      : x(x),
        blocks(blocks),
        threads(threads), warps(threads / WARP_SIZE), kernel(std::move(kernel)) {
    check(threads % WARP_SIZE == 0, "threads are no multiple of a warp");
    storage.assign(shared_bytes + 16, 0xFF);  // NaN until somebody writes
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    shared = storage.data() + (16 - address % 16) % 16;
    this->shared_bytes = shared_bytes;
    everyone.threads = threads;
    for (auto& warp : warps) warp.barrier.threads = WARP_SIZE;
    const char* mode = std::getenv("HMA_COPIES");
    eager = mode != nullptr && std::string(mode) == "eager";
  }

  void run() {
    for (auto& thread : this->threads) {
      thread.stack.reset(new char[STACK]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = STACK;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    size_t left = threads.size();
    while (left > 0) {
      moved = false;
      for (current = 0; current < int(threads.size()); ++current) {
        Thread& thread = threads[current];
        if (thread.done) continue;
        active = this;
        swapcontext(&scheduler, &thread.context);
        if (!failure.empty()) throw std::runtime_error(failure);
        if (thread.done) {
          --left;
          moved = true;
        }
      }
      check(moved, "threads wait for each other for ever");
    }
  }

  void meet(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.threads) {
      barrier.arrived = 0;
      ++barrier.generation;
      moved = true;
    }
    while (barrier.generation == generation) {
      swapcontext(&threads[current].context, &scheduler);
    }
  }

  // The value that lane `lane_wanted` of this warp gives; valid until the next call.
  template <typename T>
  const T& gather(const T& mine, int lane_wanted) {
    return *slot<T>(share(mine), lane_wanted);
  }

  template <typename T>
  int share(const T& mine) {
    static_assert(sizeof(T) <= 64);
    const int phase = threads[current].gathered++ % 2;
    std::memcpy(warp().slots[phase][current % WARP_SIZE], &mine, sizeof(T));
    meet(warp().barrier);
    return phase;
  }

  template <typename T>
  const T* slot(int phase, int lane) {
    return reinterpret_cast<const T*>(warp().slots[phase][lane % WARP_SIZE]);
  }

  Warp& warp() { return warps[current / WARP_SIZE]; }
  Thread& thread() { return threads[current]; }

  void perform(const Copy& copy) {
    check(copy.to >= shared && copy.to + 16 <= shared + shared_bytes, "a copy leaves the memory");
    check((copy.to - shared) % 16 == 0, "a copy's target is not aligned");
    if (copy.valid) {
      check(reinterpret_cast<uintptr_t>(copy.from) % 16 == 0, "a copy's source is not aligned");
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }

  static inline Block* active = nullptr;

  const int x, blocks;
  int current = 0;
  bool eager, moved = false;
  uint8_t* shared;
  int shared_bytes;
  Barrier everyone;

 private:
  static void enter() {
    Block* block = active;
    try {
      block->kernel();
    } catch (const std::exception& error) {
      block->failure = error.what();
    }
    block->threads[block->current].done = true;
  }

  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::function<void()> kernel;
  std::vector<uint8_t> storage;
  ucontext_t scheduler;
  std::string failure;
};

}  // namespace hma::on_host
