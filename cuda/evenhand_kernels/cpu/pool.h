// Threads that help the caller, but that it never waits for before they have begun: on a machine with other work to do a
// helper may not get a core for milliseconds, and a fork-join runtime such as OpenMP would then stand still at each of
// the hundreds of joins of a step.
//
// A job is a number of pieces. Whoever is free claims the next piece; the caller claims too and returns once all pieces
// are done, so it waits only for pieces that a helper has begun.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
static inline void relax() { asm volatile("yield"); }
#else
static inline void relax() {}
#endif

constexpr int PIECES_PER_THREAD = 8;  // enough to even out threads of unequal speed

class Pool {
 public:
  // The caller of `run` is one of the threads.
  explicit Pool(int num_threads) {
    for (int i = 1; i < num_threads; i++) helpers_.emplace_back([this] { help(); });
  }

  ~Pool() {
    stopping_ = true;
    publish(0);
    for (std::thread& helper : helpers_) helper.join();
  }

  int num_threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Calls piece(i) for every i in [0, num_pieces), on any thread; pieces begin in order.
  template <typename Piece>
  void run(long num_pieces, const Piece& piece) {
    if (num_pieces <= 1 || helpers_.empty()) {
      for (long i = 0; i < num_pieces; i++) piece(i);
      return;
    }
    std::lock_guard<std::mutex> only_one_job(mutex_);
    call_.store([](const void* argument, long i) { (*static_cast<const Piece*>(argument))(i); }, std::memory_order_relaxed);
    argument_.store(&piece, std::memory_order_relaxed);
    num_pieces_.store(num_pieces, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    publish(static_cast<uint32_t>(num_pieces));
    work(ticket_.load(std::memory_order_relaxed) >> 32);
    for (int turns = 0; done_.load(std::memory_order_acquire) < num_pieces; turns++) {
      if (turns < SPINS_BEFORE_YIELD)
        relax();
      else
        std::this_thread::yield();  // the helper may be waiting for this core
    }
  }

 private:
  using Call = void (*)(const void*, long);
  static constexpr int SPINS_BEFORE_YIELD = 1000;
  static constexpr int SPINS_BEFORE_SLEEP = 4000;  // some 100 us, longer than the time between two operations

  // ticket_ holds the job's number and, below it, how many pieces are unclaimed. A claim is a compare-and-swap of both,
  // so it succeeds only while the job that the helper read is still there: then the members below are that job's too,
  // since the caller replaces them only after all its pieces are done.
  void publish(uint32_t num_pieces) {
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(job << 32 | num_pieces, std::memory_order_release);
    ticket_.notify_all();
  }

  // Claim and do pieces of this job until none is left.
  void work(uint64_t job) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (ticket >> 32 == job && static_cast<uint32_t>(ticket) > 0) {
      const Call call = call_.load(std::memory_order_relaxed);
      const void* argument = argument_.load(std::memory_order_relaxed);
      const long piece = num_pieces_.load(std::memory_order_relaxed) - static_cast<uint32_t>(ticket);
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      call(argument, piece);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void help() {
    uint64_t seen = 0;  // the number of the last job that this helper looked at
    while (!stopping_) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      for (int spins = 0; ticket >> 32 == seen && spins < SPINS_BEFORE_SLEEP; spins++) {
        relax();
        ticket = ticket_.load(std::memory_order_acquire);
      }
      if (ticket >> 32 == seen) {
        ticket_.wait(ticket, std::memory_order_acquire);
      } else {
        seen = ticket >> 32;
        work(seen);
      }
    }
  }

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::atomic<bool> stopping_ = false;
  alignas(64) std::atomic<uint64_t> ticket_ = 0;
  alignas(64) std::atomic<long> done_ = 0;
  std::atomic<Call> call_ = nullptr;
  std::atomic<const void*> argument_ = nullptr;
  std::atomic<long> num_pieces_ = 0;
};
