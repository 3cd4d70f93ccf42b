// Sampling of tokens, and log probabilities, on CPUs, as calls of XLA's foreign-function interface. Each line of logits is a job of
// its own, so that no line depends on another. What is computed is said in runtime/sampler.py.

#include <cmath>
#include <limits>

#include "threads.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kSums = 256;           // weights that are summed first, to invert the distribution
constexpr float kLeast = -87.0f;     // exponents below it count as none
constexpr int64_t kManyLogits = 8192;  // from which on threads share lines

float as_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The largest number, and its first place.
int64_t best_of(const float* x, int64_t n, float* value) {
  Floats most = all(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = larger(load(x + i), most);
  float best = largest(most);
  for (; i < n; i++) best = std::max(best, x[i]);
  *value = best;
  for (i = 0; i < n; i++) {
    if (x[i] == best) return i;
  }
  return 0;  // there is no number among them
}

// Writes e to the power of x - top where x is at least `least`, else 0, and returns the sum.
float weigh(const float* x, int64_t n, float top, float least, float* to) {
  Floats sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats line = load(x + i), e = line - top;
    const Floats w = select((line >= least) & (e >= kLeast), exp_of_negative(e), Floats{});
    store(to + i, w);
    sum += w;
  }
  float total = sum_of(sum);
  for (; i < n; i++) total += to[i] = x[i] >= least && x[i] - top >= kLeast ? std::exp(x[i] - top) : 0.0f;
  return total;
}

// Threefry 2x32 with 20 rounds (https://www.thesalmons.org/john/random123/papers/random123sc11.pdf), as jax.random has it.
void threefry(uint32_t k0, uint32_t k1, uint32_t& x0, uint32_t& x1) {
  constexpr int kTurns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDA};
  x0 += k0, x1 += k1;
  for (int i = 0; i < 5; i++) {
    for (int turn : kTurns[i % 2]) {
      x0 += x1;
      x1 = (x1 << turn | x1 >> (32 - turn)) ^ x0;
    }
    x0 += keys[(i + 1) % 3];
    x1 += keys[(i + 2) % 3] + i + 1;
  }
}

// The number in [0, 1) of jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position)).
float uniform(uint32_t seed, uint32_t position) {
  uint32_t k0 = 0, k1 = position, x0 = 0, x1 = 0;
  threefry(0, seed, k0, k1);
  threefry(k0, k1, x0, x1);
  return as_float((x0 ^ x1) >> 9 | 0x3F800000) - 1.0f;
}

// The smallest of the k largest numbers. `memory` has room for all.
float kth_largest(const float* x, int64_t n, int64_t k, float* memory) {
  std::copy(x, x + n, memory);
  std::nth_element(memory, memory + (k - 1), memory + n, std::greater<float>());
  return memory[k - 1];
}

// The largest number t for which the numbers from t on have `share` of the weight of all those from `least` on.
float nucleus(const float* x, const float* weights, int64_t n, float share, float top, float* memory) {
  float total = 0;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    total += weights[i];
    if (weights[i] > 0) memory[kept++] = x[i];
  }
  const float goal = share * total;
  float sum = 0;
  for (int64_t begin = 0, size = 64; begin < kept; begin += size, size *= 4) {
    const int64_t end = std::min(begin + size, kept);
    std::nth_element(memory + begin, memory + end - 1, memory + kept, std::greater<float>());
    std::sort(memory + begin, memory + end, std::greater<float>());
    for (int64_t i = begin; i < end; i++) {
      sum += std::exp(memory[i] - top);
      if (sum >= goal) return memory[i];
    }
  }
  return -std::numeric_limits<float>::infinity();
}

// The first place at which the running sum of the weights exceeds the goal, which is then less what comes before; never one
// without weight.
int64_t exceeding(const float* weights, int64_t n, float& goal) {
  float sum = 0, before = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; i++) {
    if (weights[i] <= 0) continue;
    last = i, before = sum;
    if ((sum += weights[i]) > goal) break;
  }
  goal = std::max(goal - before, 0.0f);
  return last;
}

struct Columns {
  int64_t seed, flags, top_k, temperature, top_p, min_p, presence, frequency, repetition;
};
struct Flags {
  int64_t bias, penalties, grammar;
};

struct Lines {
  const float* logits;  // [S, V]
  const int32_t *rows, *position;
  const bool* samples;
  const int32_t *params, *drafts;          // [S, P], [S, D]
  const int32_t *counts, *bias_ids;        // [R, V], [R, B]
  const float* bias_values;                // [R, B]
  const int32_t* bias_until;               // [R, B]
  const bool* masks;                       // [R, M]
  int32_t* tokens;
  int64_t V, P, D, B, M;
  Columns columns;
  Flags flags;
  int32_t in_prompt;

  int32_t param(int64_t s, int64_t column) const { return params[s * P + column]; }

  void penalise(int64_t s, float* y, int32_t* own) const {
    std::copy(counts + rows[s] * V, counts + (rows[s] + 1) * V, own);
    for (int64_t d = 0; d < D; d++) {
      const int32_t draft = drafts[s * D + d];
      if (draft >= 0 && draft < V) own[draft]++;
    }
    const float repetition = as_float(param(s, columns.repetition)), frequency = as_float(param(s, columns.frequency));
    const float presence = as_float(param(s, columns.presence));
    for (int64_t i = 0; i < V; i++) {
      if (own[i] == 0) continue;
      const int32_t in_output = own[i] & (in_prompt - 1);
      y[i] = y[i] > 0 ? y[i] / repetition : y[i] * repetition;
      y[i] -= frequency * in_output;
      if (in_output > 0) y[i] -= presence;
    }
  }

  // Writes the line with its bias, penalties and mask; `own` is memory.
  void adjust(int64_t s, float* y, int32_t* own) const {
    const int32_t flag = param(s, columns.flags);
    std::copy(logits + s * V, logits + (s + 1) * V, y);
    for (int64_t b = rows[s] * B; flag & flags.bias && b < (rows[s] + 1) * B; b++) {
      const int32_t id = bias_ids[b];
      if (position[s] < bias_until[b] && id >= 0 && id < V) y[id] += bias_values[b];
    }
    if (flag & flags.penalties) penalise(s, y, own);
    if (flag & flags.grammar && M >= V) {
      const bool* mask = masks + rows[s] * M;
      const float lowest = std::numeric_limits<float>::lowest(), none = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < V; i++) y[i] = mask[i] ? std::max(y[i], lowest) : none;
    }
  }

  int32_t draw(int64_t s, const float* y, float top, float* memory) const {
    const float temperature = as_float(param(s, columns.temperature)), top_p = as_float(param(s, columns.top_p));
    const float min_p = as_float(param(s, columns.min_p));
    const int64_t top_k = param(s, columns.top_k);
    float *scaled = memory, *weights = memory + V, *spare = memory + 2 * V;
    for (int64_t i = 0; i < V; i++) scaled[i] = (y[i] - top) / temperature;
    float least = -std::numeric_limits<float>::infinity();
    if (top_k < V) least = kth_largest(scaled, V, std::max<int64_t>(top_k, 1), spare);
    if (top_p < 1) {
      weigh(scaled, V, 0, least, weights);
      least = std::max(least, nucleus(scaled, weights, V, top_p, 0, spare));
    }
    if (min_p > 0) least = std::max(least, std::log(min_p));
    weigh(scaled, V, 0, std::min(least, 0.0f), weights);
    const int64_t blocks = (V + kSums - 1) / kSums;
    float* sums = spare;
    float total = 0;
    for (int64_t b = 0; b < blocks; b++) {
      sums[b] = 0;
      for (int64_t i = b * kSums; i < std::min(V, (b + 1) * kSums); i++) sums[b] += weights[i];
      total += sums[b];
    }
    float goal = uniform(param(s, columns.seed), position[s]) * total;
    const int64_t first = exceeding(sums, blocks, goal) * kSums;
    return first + exceeding(weights + first, std::min<int64_t>(kSums, V - first), goal);
  }

  void sample(int64_t s) const {
    tokens[s] = 0;
    if (!samples[s]) return;
    float* memory = scratch(4 * V + kSums);
    const float* y = logits + s * V;
    if (param(s, columns.flags) & (flags.bias | flags.penalties | flags.grammar)) {
      adjust(s, memory + 3 * V, reinterpret_cast<int32_t*>(memory));
      y = memory + 3 * V;
    }
    float top;
    tokens[s] = best_of(y, V, &top);
    if (as_float(param(s, columns.temperature)) > 0) tokens[s] = draw(s, y, top, memory);
  }
};

using Numbers = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Bools = ffi::Buffer<ffi::PRED>;

ffi::Error sample(ffi::ThreadPool threads, ffi::Span<const int64_t> c, ffi::Span<const int64_t> f, int64_t in_prompt, Numbers logits,
                  Integers rows, Integers position, Bools samples, Integers params, Integers drafts, Integers counts,
                  Integers bias_ids, Numbers bias_values, Integers bias_until, Bools masks, ffi::Result<Integers> tokens) {
  const int64_t S = logits.dimensions()[0], V = logits.dimensions()[1];
  const Lines lines{logits.typed_data(), rows.typed_data(), position.typed_data(), samples.typed_data(), params.typed_data(),
                    drafts.typed_data(), counts.typed_data(), bias_ids.typed_data(), bias_values.typed_data(),
                    bias_until.typed_data(), masks.typed_data(), tokens->typed_data(), V, params.dimensions()[1],
                    drafts.dimensions()[1], bias_ids.dimensions()[1], masks.dimensions()[1],
                    {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8]}, {f[0], f[1], f[2]}, int32_t(in_prompt)};
  share(threads, S, S * V < kManyLogits, [lines](int s) { lines.sample(s); });
  return ffi::Error::Success();
}

struct Scores {
  const float* logits;  // [S, V]
  const int32_t* chosen;
  float* own;
  int32_t* ids;   // [S, K]
  float* values;  // [S, K]
  int64_t V, K;

  void score(int64_t s) const {
    const float* x = logits + s * V;
    float* memory = scratch(2 * V);
    float top;
    best_of(x, V, &top);
    const float norm = top + std::log(weigh(x, V, top, -std::numeric_limits<float>::infinity(), memory));
    int32_t* order = reinterpret_cast<int32_t*>(memory + V);
    for (int64_t i = 0; i < V; i++) order[i] = i;
    const int64_t found = std::min(K, V);
    std::partial_sort(order, order + found, order + V,
                      [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
    for (int64_t k = 0; k < K; k++) {
      ids[s * K + k] = k < found ? order[k] : 0;
      values[s * K + k] = k < found ? x[order[k]] - norm : -std::numeric_limits<float>::infinity();
    }
    own[s] = x[std::clamp<int64_t>(chosen[s], 0, V - 1)] - norm;
  }
};

ffi::Error logprobs(ffi::ThreadPool threads, Numbers logits, Integers chosen, Bools wanted, ffi::Result<Numbers> own,
                    ffi::Result<Integers> ids, ffi::Result<Numbers> values) {
  const int64_t S = logits.dimensions()[0], V = logits.dimensions()[1], K = ids->dimensions()[1];
  const Scores scores{logits.typed_data(), chosen.typed_data(), own->typed_data(), ids->typed_data(), values->typed_data(), V, K};
  if (!wanted.typed_data()[0]) {
    std::fill_n(scores.own, S, 0.0f);
    std::fill_n(scores.ids, S * K, 0);
    std::fill_n(scores.values, S * K, 0.0f);
    return ffi::Error::Success();
  }
  share(threads, S, S * V < kManyLogits, [scores](int s) { scores.score(s); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sgl_jax_sample, sample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("columns")
                                  .Attr<ffi::Span<const int64_t>>("flags")
                                  .Attr<int64_t>("in_prompt")
                                  .Arg<Numbers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Bools>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Numbers>()
                                  .Arg<Integers>()
                                  .Arg<Bools>()
                                  .Ret<Integers>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sgl_jax_logprobs, logprobs,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Numbers>()
                                  .Arg<Integers>()
                                  .Arg<Bools>()
                                  .Ret<Numbers>()
                                  .Ret<Integers>()
                                  .Ret<Numbers>());
