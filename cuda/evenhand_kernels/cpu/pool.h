// Threads that help the caller, but that it never waits for before they have begun: on a machine with other work to do a
// helper may not get a core for milliseconds, and a fork-join runtime such as OpenMP would then stand still at each of
// the hundreds of joins of a step.
//
// A job is a number of items. Whoever is free claims some of them; the caller claims too and returns once all are done, so it
// waits only for items that a helper has begun. Who waits asks for the memory that the next job reads.
#pragma once

#include <algorithm>
#include <array>
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

// Memory that a job reads, as much for each item.
struct Reading {
  const char* begin;
  long num_items, item_bytes;
};

// What the next jobs read, in order, as far as it is known.
class Readings {
 public:
  static constexpr int MOST = 16;

  void add(Reading reading) { parts_[count_++] = reading; }
  int count() const { return count_; }
  const Reading& operator[](int i) const { return parts_[i]; }

 private:
  std::array<Reading, MOST> parts_;
  int count_ = 0;
};

class Pool {
 public:
  // What one thread claims of a job, again and again: items [first, end).
  class Claims {
   public:
    long first = 0, end = 0;

    // False: all items of the job are claimed.
    bool next() {
      if (!pool_.claim(*this)) return false;
      num_claimed_ += end - first;
      return true;
    }

   private:
    friend class Pool;
    Claims(Pool& pool, uint32_t job, int thread) : pool_(pool), job_(job), thread_(thread) {}

    Pool& pool_;
    const uint32_t job_;
    const int thread_;
    long num_claimed_ = 0;
  };

  // The caller of `run` is one of the threads.
  explicit Pool(int num_threads) : ranges_(num_threads) {
    for (int i = 1; i < num_threads; i++) helpers_.emplace_back([this, i] { help(i); });
  }

  ~Pool() {
    stopping_ = true;
    publish();
    for (std::thread& helper : helpers_) helper.join();
  }

  // One without helpers: what it runs, the caller does.
  static Pool& alone() {
    static Pool pool(1);
    return pool;
  }

  int num_threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Calls piece(i) for every i in [0, num_pieces), on any thread; pieces begin in order.
  template <typename Piece>
  void run(long num_pieces, const Piece& piece, const Readings& after = {}) {
    if (num_pieces <= 1 || helpers_.empty()) {
      for (long i = 0; i < num_pieces; i++) piece(i);
      return;
    }
    start(num_pieces, 1, after, [&](Claims& claims) {
      do
        for (long i = claims.first; i < claims.end; i++) piece(i);
      while (claims.next());
    });
  }

  // Calls work(claims) on each thread that has claimed some of the items [0, num_items), which goes on until there is nothing to claim.
  // Each thread begins with a part of them that is its own, in order, and goes on with the last ones of others.
  template <typename Work>
  void share(long num_items, const Work& work, const Readings& after = {}) {
    start(num_items, num_threads(), after, work);
  }

 private:
  using Call = void (*)(const void*, Claims&);
  static constexpr int SPINS_BEFORE_YIELD = 1000;
  static constexpr int SPINS_BEFORE_SLEEP = 4000;  // some 100 us, longer than the time between two operations
  static constexpr long MOST_AHEAD = 4 << 20;      // bytes that a thread asks for before they are needed

  // A number of items that a range counts together, so that places in it fit 16 bits.
  static long grain_of(long num_items) { return num_items / 0xffff + 1; }

  // The job's number and which of its grains are unclaimed. A claim is a compare-and-swap of all, so it succeeds only while the
  // job that the thread read is still there: then the members below are that job's too, since the caller replaces them only
  // after all its items are done.
  struct alignas(64) Range {
    std::atomic<uint64_t> word = 0;

    static uint64_t packed(uint32_t job, long first, long end) { return uint64_t(job) << 32 | uint64_t(first) << 16 | uint64_t(end); }
  };

  template <typename Work>
  void start(long num_items, int num_ranges, const Readings& after, const Work& work) {
    std::lock_guard<std::mutex> only_one_job(mutex_);
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    const long grain = grain_of(num_items), grains = (num_items + grain - 1) / grain;
    call_.store([](const void* argument, Claims& claims) { (*static_cast<const Work*>(argument))(claims); }, std::memory_order_relaxed);
    argument_.store(&work, std::memory_order_relaxed);
    num_items_.store(num_items, std::memory_order_relaxed);
    num_ranges_.store(num_ranges, std::memory_order_relaxed);
    after_ = after;
    done_.store(0, std::memory_order_relaxed);
    for (int i = 0; i < num_ranges; i++)
      ranges_[i].word.store(Range::packed(job, grains * i / num_ranges, grains * (i + 1) / num_ranges), std::memory_order_relaxed);
    publish();
    this->work(job, 0);
    Ahead ahead(after, 0, num_threads());
    for (int turns = 0; done_.load(std::memory_order_acquire) < num_items; turns++) {
      if (turns < SPINS_BEFORE_YIELD)
        ahead.ask(), relax();
      else
        std::this_thread::yield();  // the helper may be waiting for this core
    }
  }

  // Asks for what a thread reads first of the next jobs.
  class Ahead {
   public:
    Ahead(const Readings& readings, int thread, int num_threads) : readings_(readings), thread_(thread), num_threads_(num_threads) {}

    void ask() {
      if (left_ <= 0 && !go_on()) return;
      for (int line = 0; line < LINES; line++, next_ += 64) __builtin_prefetch(next_, 0, 2);
      left_ -= LINES * 64, total_ += LINES * 64;
    }

   private:
    static constexpr int LINES = 4;  // of 64 bytes at a time

    bool go_on() {
      if (number_ == readings_.count() || total_ >= MOST_AHEAD) return false;
      const auto [begin, num_items, item_bytes] = readings_[number_++];
      const long first = num_items * thread_ / num_threads_, end = num_items * (thread_ + 1) / num_threads_;
      next_ = begin + first * item_bytes, left_ = (end - first) * item_bytes;
      return left_ > 0;
    }

    const Readings readings_;
    const int thread_, num_threads_;
    int number_ = 0;
    const char* next_ = nullptr;
    long left_ = 0, total_ = 0;
  };

  void publish() {
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
  }

  // Claims one grain of the thread's own range, in order, or the last half of what another has left.
  bool claim(Claims& claims) {
    const int num_ranges = num_ranges_.load(std::memory_order_relaxed);
    for (int i = 0; i < num_ranges; i++) {
      std::atomic<uint64_t>& word = ranges_[(claims.thread_ + i) % num_ranges].word;
      uint64_t seen = word.load(std::memory_order_acquire);
      while (seen >> 32 == claims.job_) {
        const long first = seen >> 16 & 0xffff, end = seen & 0xffff, middle = first + (end - first) / 2;
        if (first == end) break;
        const bool is_own = i == 0;
        const uint64_t left = is_own ? Range::packed(claims.job_, first + 1, end) : Range::packed(claims.job_, first, middle);
        const long num_items = num_items_.load(std::memory_order_relaxed), grain = grain_of(num_items);
        if (!word.compare_exchange_weak(seen, left, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        claims.first = (is_own ? first : middle) * grain;
        claims.end = std::min(num_items, (is_own ? first + 1 : end) * grain);
        return true;
      }
    }
    return false;
  }

  // Does what this thread can claim of the job; returns what is read after it.
  Readings work(uint32_t job, int thread) {
    Claims claims(*this, job, thread);
    if (!claims.next()) return {};
    call_.load(std::memory_order_relaxed)(argument_.load(std::memory_order_relaxed), claims);
    const Readings after = after_;
    done_.fetch_add(claims.num_claimed_, std::memory_order_release);
    return after;
  }

  void help(int thread) {
    uint32_t seen = 0;  // the number of the last job that this helper looked at
    while (!stopping_) {
      Ahead ahead(work(seen, thread), thread, num_threads());
      uint32_t job = job_.load(std::memory_order_acquire);
      for (int spins = 0; job == seen && spins < SPINS_BEFORE_SLEEP; spins++) {
        ahead.ask(), relax();
        job = job_.load(std::memory_order_acquire);
      }
      if (job == seen) job_.wait(job, std::memory_order_acquire);
      seen = job_.load(std::memory_order_acquire);
    }
  }

  std::vector<std::thread> helpers_;
  std::vector<Range> ranges_;  // by thread; a job whose pieces begin in order has only the first
  std::mutex mutex_;
  std::atomic<bool> stopping_ = false;
  alignas(64) std::atomic<uint32_t> job_ = 0;
  alignas(64) std::atomic<long> done_ = 0;
  alignas(64) std::atomic<Call> call_ = nullptr;
  std::atomic<const void*> argument_ = nullptr;
  std::atomic<long> num_items_ = 0;
  std::atomic<int> num_ranges_ = 1;
  Readings after_;
};
