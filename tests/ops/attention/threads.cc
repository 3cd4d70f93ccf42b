// Runs the attention library's jobs on threads that come and go, for a thread sanitizer. Prints the sum of outputs.

#include <cstdio>
#include <functional>
#include <thread>

#include "attention.cc"

// A pool like XLA's that starts a thread for each task, some of them late.
struct Threads {
  std::vector<std::thread> started;
  int num_threads() const { return 4; }
  void Schedule(std::function<void()> task) {
    const bool late = started.size() % 3 == 2;
    started.emplace_back([task, late] {
      if (late) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      task();
    });
  }
};

int main() {
  constexpr int kHeads = 6, kKvHeads = 3, kPage = 16, kPages = 400, kRows = 4;
  const int width = 64, lens[kRows] = {3000, 700, 5, 90}, number[kRows] = {1, 200, 1, 70};
  const int32_t missing[kRows] = {};
  std::vector<int32_t> table(kRows * 200), kv_lens(lens, lens + kRows), cu{0};
  for (int row = 0, next = 1; row < kRows; row++) {
    cu.push_back(cu.back() + number[row]);
    for (int i = 0; i < (lens[row] + kPage - 1) / kPage; i++) table[row * 200 + i] = next++;
  }
  const int tokens = cu.back() + 3;
  auto filled = [](size_t size) {
    std::vector<float> x(size);
    for (size_t i = 0; i < size; i++) x[i] = float(i * 7919 % 1000) / 500 - 1;
    return x;
  };
  std::vector<float> q = filled(tokens * kHeads * width), k = filled(tokens * kKvHeads * width), v = k;
  std::vector<float> pool = filled(size_t(kPages) * kKvHeads * 2 * kPage * width), out(q.size());
  const Call<float> call{q.data(), out.data(), kHeads, kHeads / kKvHeads,
                         {pool.data(), kKvHeads, 2, kPage, width, width, 1.0f, 1.0f},
                         {table.data(), kv_lens.data(), cu.data(), missing, kRows, 200, 0},
                         {0.125f, 0.0f, 0.0f, 1 << 30, nullptr, 0}};
  for (int i = 0; i < 5; i++) {
    Threads threads;
    run(threads, call, k.data(), v.data(), tokens);
    double sum = 0;
    for (float x : out) sum += x;
    std::printf("%.9g\n", sum);
    for (std::thread& thread : threads.started) thread.join();
  }
}
