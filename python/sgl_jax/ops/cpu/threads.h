// Jobs that XLA's threads share, and memory of a thread.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

namespace {

constexpr std::chrono::microseconds kPatience{20};  // most jobs end within it, and a thread that sleeps is woken later

// Memory of the thread, kept from call to call.
inline float* scratch(size_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < floats) memory.resize(floats);
  return memory.data();
}

// Counts the jobs that threads take one after another. A thread that comes when none is left touches nothing else.
struct Work {
  std::atomic<int> next{0}, done{0};
  const int number;
  std::mutex mutex;
  std::condition_variable all_done;

  explicit Work(int number) : number(number) {}
  template <typename F>
  void take(F f) {
    int finished = 0;
    for (int i; (i = next.fetch_add(1)) < number; finished++) f(i);
    if (finished == 0 || done.fetch_add(finished) + finished < number) return;
    std::lock_guard<std::mutex> lock(mutex);
    all_done.notify_one();
  }
};

// Calls f(i) for each i below `number`: here if the call is small, else on XLA's threads and this one. It waits only for jobs
// that a thread has begun: a thread that cannot start, because all others wait as this one does, holds up nothing.
template <typename Threads, typename F>
void share(Threads& threads, int number, bool is_small, F f) {
  if (is_small || number == 1) {
    for (int i = 0; i < number; i++) f(i);
    return;
  }
  auto work = std::make_shared<Work>(number);
  const int helpers = std::min<int>(threads.num_threads(), number) - 1;
  for (int i = 0; i < helpers; i++) threads.Schedule([work, f] { work->take(f); });
  work->take(f);
  const auto enough = std::chrono::steady_clock::now() + kPatience;
  while (work->done < number && std::chrono::steady_clock::now() < enough) continue;
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_done.wait(lock, [&] { return work->done == number; });
}

}  // namespace
