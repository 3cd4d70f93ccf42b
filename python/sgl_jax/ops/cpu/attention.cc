// Paged attention on CPUs: all rows of a step in one layer, as one call of XLA's foreign-function interface.
//
// The contract is that of ops/attention/api.py. New K and V are written into the pool, which XLA hands over to be changed in
// place. Then XLA's threads share jobs. A job is a tile: consecutive queries of one row, with the G heads that share a KV head.
// It walks the row's keys in blocks, with online softmax in float32. Each (query, head) of a tile is a line. Tiles of few lines
// (decoding) read K and V where they lie; tiles of many lines (prompts, latent attention) pack each block for products first.
//
// setup.py compiles this file once for each instruction set.

#include <cmath>
#include <vector>

#include "eight_bits.h"
#include "products.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using Integers = ffi::Buffer<ffi::S32>;
using Numbers = ffi::Buffer<ffi::F32>;

constexpr int kTileLines = 128;    // lines of a tile, unless one token alone has more
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif
constexpr int kFewLines = kHasPairs ? 8 : 32;  // lines up to which packing costs more than it gains
constexpr int kSegment = 1024;     // keys of a job, where a row is a single tile
// Lines times keys below which waking another thread costs more than it gains.
constexpr int kSmallCall = kHasPairs ? 1 << 14 : 1 << 11;
constexpr float kFloor = -1e30f;   // finite, so that a line that has seen no key yet makes no inf - inf

// The pool's numbers: those of the queries, or eight bits each, which are widened before they are used.
template <typename Number>
struct Pool {
  using Widen = void (*)(const uint8_t*, Number*, int);
  using Narrow = void (*)(const float*, uint8_t*, int);
  uint8_t* data;  // [pages, heads, planes, page_size, width]
  int64_t heads, planes, page_size, width;
  int64_t value_width;           // the first columns of the last plane are the values
  float key_scale, value_scale;  // factors that bring K and V of the pool back to their values

  Widen widen;    // null where the numbers are those of the queries
  Narrow narrow;

  int64_t item() const { return widen != nullptr ? 1 : sizeof(Number); }
  uint8_t* keys(int64_t page, int head, int64_t offset) const {
    return data + ((page * heads + head) * planes * page_size + offset) * width * item();
  }
  uint8_t* values(int64_t page, int head, int64_t offset) const {
    return keys(page, head, offset) + (planes - 1) * page_size * width * item();
  }
};

struct Rows {
  const int32_t *page_table, *kv_lens, *cu_q_lens, *num_missing;  // see RaggedBatch
  int64_t number, pages_per_row;
  int32_t first_page;  // of the layer

  int end(int row) const { return cu_q_lens[row + 1] - num_missing[row]; }  // of the tokens that are computed
  int64_t page(int row, int index) const { return first_page + page_table[row * pages_per_row + index]; }
};

struct Scoring {
  float scale, softcap, log_length;  // softcap and log_length are 0 where the model has none
  int32_t window;
  const float* sinks;  // [N], or null
  int32_t first_key;   // keys before it are not seen
};

struct Job {
  int row, head;      // head: of KV
  int first, tokens;  // packed tokens
  int position;       // of the first token
  int begin, end;     // keys
  float* partial;     // memory for the lines' state where the tile's keys are several jobs; else null
};

// State of a tile's lines: the largest score so far, the sum of weights relative to it, the weighted sum of values.
struct Lines {
  float *top, *total;  // [lines]
  float* acc;          // [lines, width]
  int width;

  Lines(float* memory, int lines, int width) : top(memory), total(memory + lines), acc(memory + 2 * lines), width(width) {}
  static size_t size(int lines, int width) { return size_t(lines) * (width + 2); }
  float* acc_of(int line) const { return acc + size_t(line) * width; }
  void raise(int line, float new_top) const {
    if (new_top <= top[line]) return;
    const float shrink = std::exp(top[line] - new_top);
    for (int h = 0; h < width; h++) acc_of(line)[h] *= shrink;
    total[line] *= shrink;
    top[line] = new_top;
  }
};

template <typename Number>
struct Call {
  const Number* q;  // [tokens, heads, width]
  Number* out;      // [tokens, heads, value_width]
  int heads, group;  // N, G
  Pool<Number> pool;
  Rows rows;
  Scoring scoring;

  int64_t head_of(const Job& job, int line) const {  // index in [tokens, heads]
    return int64_t(job.first + line / group) * heads + job.head * group + line % group;
  }
  int first_key(int position) const {  // that a query sees; behind its own if it sees none
    return std::max(scoring.first_key, scoring.window > position ? 0 : position - scoring.window + 1);
  }
  int first_read(int position) const { return std::min(first_key(position), position); }  // no tile is without a key
  int acc_width() const { return round_up(pool.value_width, 4 * kLanes); }

  // --- Jobs ---

  // Cuts rows into tiles, and the keys of rows of a single tile into segments. Neither depends on the number of threads or on
  // other rows, so that results do not. Jobs of a tile follow each other.
  std::vector<Job> make_jobs(std::vector<float>& partials) const {
    const int tile = std::max(1, kTileLines / group);
    std::vector<Job> jobs;
    size_t size = 0;
    for (int row = 0; row < rows.number; row++) {
      const int first = rows.cu_q_lens[row], number = rows.end(row) - first;
      const int start = rows.kv_lens[row] - (rows.cu_q_lens[row + 1] - first);
      for (int t = 0; t < number; t += tile) {
        const int tokens = std::min(tile, number - t), begin = first_read(start + t), end = start + t + tokens;
        const int segments = number <= tile ? (end - begin + kSegment - 1) / kSegment : 1;
        const int length = round_up((end - begin + segments - 1) / segments, kBlock);
        for (int i = 0; i < pool.heads * segments; i++) {
          const int at = begin + i % segments * length;
          jobs.push_back({row, i / segments, first + t, tokens, start + t, at, std::min(at + length, end), nullptr});
          if (segments > 1) size += Lines::size(tokens * group, acc_width());
        }
      }
    }
    partials.resize(size);
    size_t used = 0;
    for (Job& job : jobs) {
      if (job.begin == first_read(job.position) && job.end == job.position + job.tokens) continue;
      job.partial = &partials[used];
      used += Lines::size(job.tokens * group, acc_width());
    }
    return jobs;
  }

  // Adds up the states of the jobs of each tile that several share.
  void join(const std::vector<Job>& jobs) const {
    for (size_t i = 0; i < jobs.size();) {
      const Job& job = jobs[i++];
      if (job.partial == nullptr) continue;
      const int lines = job.tokens * group;
      const Lines sum(job.partial, lines, acc_width());
      for (; i < jobs.size() && jobs[i].row == job.row && jobs[i].head == job.head; i++) {
        const Lines other(jobs[i].partial, lines, acc_width());
        for (int line = 0; line < lines; line++) {
          sum.raise(line, other.top[line]);
          other.raise(line, sum.top[line]);
          for (int h = 0; h < sum.width; h++) sum.acc_of(line)[h] += other.acc_of(line)[h];
          sum.total[line] += other.total[line];
        }
      }
      finish(job, sum);
    }
  }

  // Lays out the state of lines that have seen no key. A sink is a key of its score without a value. It counts in the first of
  // the jobs that share a tile.
  Lines start(const Job& job, float* memory) const {
    const int lines = job.tokens * group;
    const Lines state(job.partial != nullptr ? job.partial : memory, lines, acc_width());
    const bool has_sink = scoring.sinks != nullptr && job.begin == first_read(job.position);
    for (int i = 0; i < lines; i++) {
      state.top[i] = has_sink ? scoring.sinks[job.head * group + i % group] : kFloor;
      state.total[i] = has_sink ? 1.0f : 0.0f;
    }
    std::fill(state.acc, state.acc_of(lines), 0.0f);
    return state;
  }

  void finish(const Job& job, const Lines& state) const {
    for (int i = 0; i < job.tokens * group; i++) {
      Number* to = out + head_of(job, i) * pool.value_width;
      const float factor = pool.value_scale / std::max(state.total[i], 1e-30f);
      for (int h = 0; h < pool.value_width; h++) assign(to[h], state.acc_of(i)[h] * factor);
    }
  }

  // --- A tile ---

  void walk(const Job& job) const {
    const bool whole_vectors = pool.width % kLanes == 0 && pool.value_width % kLanes == 0;
    if (whole_vectors && job.tokens * group <= kFewLines) return walk_in_place(job);
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Number, BFloat16>) {
      if (pool.width % 2 == 0) return walk_packed<PairUnit>(job);
    }
#endif
    walk_packed<FloatUnit>(job);
  }

  void walk_in_place(const Job& job) const {
    const int lines = job.tokens * group, width = pool.width;
    float* q_lines = scratch(size_t(lines) * (width + kBlock) + Lines::size(lines, acc_width()));  // [lines, width]
    float* scores = q_lines + lines * width;                                                       // [lines, kBlock]
    const Lines state = start(job, scores + lines * kBlock);
    for (int i = 0; i < lines; i++) {
      for (int h = 0; h < width; h++) q_lines[i * width + h] = to_float(q[head_of(job, i) * width + h]);
    }
    for (int begin = job.begin; begin < job.end; begin += kBlock) {
      const int n = std::min(kBlock, job.end - begin);
      in_groups<kGroup>(lines, [&](int i, auto r) {
        for_runs(job, begin, n, [&](int j, const Number* keys, const Number*, int run) {
          if (i == 0) fetch(job, begin + j, run, &Pool<Number>::values);
          multiply_keys<r()>(q_lines + i * width, keys, run, width, scores + i * kBlock + j);
        });
        for (int line = i; line < i + r(); line++) weigh(job, line, scores + line * kBlock, begin, n, state);
        for_runs(job, begin, n, [&](int j, const Number*, const Number* values, int run) {
          if (i == 0 && begin + kBlock + j < job.end) fetch(job, begin + kBlock + j, run, &Pool<Number>::keys);
          add_values<r()>(scores + i * kBlock + j, values, run, width, pool.value_width, state.acc_of(i), state.width);
        });
      });
    }
    if (job.partial == nullptr) finish(job, state);
  }

  template <typename U>
  void walk_packed(const Job& job) const {
    using Unit = typename U::Unit;
    static_assert(sizeof(Unit) == sizeof(float));
    constexpr int kKeys = kBlock / U::kNumbers;  // units of a block along its keys
    const int lines = job.tokens * group, width = pool.width, steps = width / U::kNumbers, columns = acc_width();
    const size_t packed = size_t(steps) * kBlock + size_t(kKeys) * columns;
    float* line = scratch(width + kGroup * (kBlock + kKeys) + size_t(lines) * steps + packed + Lines::size(lines, columns));
    float* scores = line + width;                                           // [kGroup, kBlock]
    Unit* weights = reinterpret_cast<Unit*>(scores + kGroup * kBlock);      // [kGroup, kKeys]
    Unit* q_lines = weights + kGroup * kKeys;                               // [lines, steps]
    Unit* keys = q_lines + size_t(lines) * steps;                           // [steps, kBlock]
    Unit* values = keys + size_t(steps) * kBlock;                           // [kKeys, columns]
    const Lines state = start(job, reinterpret_cast<float*>(keys + packed));
    std::fill(keys, keys + packed, Unit(0));
    for (int i = 0; i < lines; i++) {
      for (int h = 0; h < width; h++) line[h] = to_float(q[head_of(job, i) * width + h]);
      U::pack_line(q_lines + size_t(i) * steps, line, width);
    }
    for (int begin = job.begin; begin < job.end; begin += kBlock) {
      const int n = std::min(kBlock, job.end - begin), even = round_up(n, U::kNumbers);
      pack<U>(job, begin, n, keys, values);
      in_groups<kGroup>(lines, [&](int i, auto r) {
        multiply<r(), U>(q_lines + size_t(i) * steps, steps, keys, kBlock, steps, scores, kBlock, round_up(n, 4 * kLanes), false);
        for (int x = 0; x < r(); x++) {
          weigh(job, i + x, scores + x * kBlock, begin, n, state);
          U::pack_line(weights + x * kKeys, scores + x * kBlock, even);
        }
        multiply<r(), U>(weights, kKeys, values, columns, even / U::kNumbers, state.acc_of(i), columns, columns, true);
      });
    }
    if (job.partial == nullptr) finish(job, state);
  }

  // Packs the keys of a block as [steps, kBlock] and its values as [kKeys, columns].
  template <typename U>
  void pack(const Job& job, int begin, int n, typename U::Unit* keys, typename U::Unit* values) const {
    const int width = pool.width, steps = width / U::kNumbers;
    const Number* even = nullptr;  // values of the last key with an even index
    for_runs(job, begin, n, [&](int j, const Number* key, const Number* value, int run) {
      for (int first = 0; first < run; first += kLanes) {  // a square at a time, which stays in the nearest cache
        const int last = std::min(first + kLanes, run);
        for (int h = 0; h < steps; h++) {
          for (int x = first; x < last; x++) keys[h * kBlock + j + x] = U::of_key(key + x * width, h);
        }
      }
      for (int x = 0; x < run; x++) {
        const Number* row = value + x * width;
        const bool is_first = (j + x) % U::kNumbers == 0, is_last = (j + x + 1) % U::kNumbers == 0 || j + x + 1 == n;
        if (is_first) even = row;  // a last one without a partner is paired with itself; the weight of the partner is 0
        if (is_last) U::pack_values(values + (j + x) / U::kNumbers * acc_width(), even, row, pool.value_width);
      }
    });
  }

  // Brings K or V of `number` keys from `position` on near the processor, as far as they lie in one page.
  void fetch(const Job& job, int position, int number, uint8_t* (Pool<Number>::*place)(int64_t, int, int64_t) const) const {
    const int64_t offset = position % pool.page_size, run = std::min<int64_t>(number, pool.page_size - offset);
    const uint8_t* at = (pool.*place)(rows.page(job.row, position / pool.page_size), job.head, offset);
    for (int64_t i = 0; i < run * pool.width * pool.item(); i += 64) __builtin_prefetch(at + i);
  }

  static Number* widened(size_t numbers) {
    thread_local std::vector<Number> memory;
    if (memory.size() < numbers) memory.resize(numbers);
    return memory.data();
  }

  // Calls f(j, keys, values, number) for each run of keys [begin + j, begin + j + number) that lie in one page.
  template <typename F>
  void for_runs(const Job& job, int begin, int n, F f) const {
    for (int j = 0, run; j < n; j += run) {
      const int index = (begin + j) / pool.page_size, offset = (begin + j) % pool.page_size;
      run = std::min<int>(n - j, pool.page_size - offset);
      const int64_t page = rows.page(job.row, index);
      const uint8_t *keys = pool.keys(page, job.head, offset), *values = pool.values(page, job.head, offset);
      if (pool.widen == nullptr) {
        f(j, reinterpret_cast<const Number*>(keys), reinterpret_cast<const Number*>(values), run);
        continue;
      }
      Number* wide = widened(2 * kBlock * pool.width) + j * pool.width;  // each run of a block in a place of its own
      pool.widen(keys, wide, run * pool.width);
      if (pool.planes > 1) pool.widen(values, wide + kBlock * pool.width, run * pool.width);
      f(j, wide, pool.planes > 1 ? wide + kBlock * pool.width : wide, run);
    }
  }

  // Turns the scores of a line with keys [begin, begin + n) into weights, in place, and the line's state with them. Weights up
  // to the next whole vector become 0.
  void weigh(const Job& job, int line, float* scores, int begin, int n, const Lines& state) const {
    const int position = job.position + line / group, low = first_key(position), high = std::min(position + 1, begin + n);
    const float factor = scoring.scale * pool.key_scale, cap = scoring.softcap;
    const float logn = scoring.log_length > 0 ? std::max(1.0f, std::log(std::max(position, 1) * 1.0f) / scoring.log_length) : 1;
    std::fill(scores + n, scores + round_up(n, kLanes), 0.0f);
    Floats best = all(state.top[line]), total = Floats{};
    Ints index;
    for (int i = 0; i < kLanes; i++) index[i] = begin + i;
    for (int j = 0; j < n; j += kLanes, index += kLanes) {
      Floats x = load(scores + j) * factor;
      if (cap > 0) x = cap * tanh_of(x / cap);
      x = select((index >= low) & (index < high), x * logn, all(kFloor));
      store(scores + j, x);
      best = larger(best, x);
    }
    const float top = largest(best);
    for (int j = 0; j < n; j += kLanes) {
      const Floats x = load(scores + j), weight = select(x > kFloor, exp_of_negative(x - top), Floats{});
      store(scores + j, weight);
      total += weight;
    }
    state.raise(line, top);
    state.total[line] += sum_of(total);
  }

  // Writes new K or V, [tokens, KV heads, width], to their places in the pool.
  void write(const Number* tokens, bool are_values) const {
    const float scale = are_values ? pool.value_scale : pool.key_scale;
    float* line = scratch(pool.width);
    for (int row = 0; row < rows.number; row++) {
      for (int token = rows.cu_q_lens[row]; token < rows.end(row); token++) {
        const int position = rows.kv_lens[row] - rows.cu_q_lens[row + 1] + token;
        const int64_t page = rows.page(row, position / pool.page_size), offset = position % pool.page_size;
        for (int head = 0; head < pool.heads; head++) {
          const Number* from = tokens + (token * pool.heads + head) * pool.width;
          uint8_t* to = are_values ? pool.values(page, head, offset) : pool.keys(page, head, offset);
          for (int h = 0; h < pool.width; h++) line[h] = to_float(from[h]) / scale;
          if (pool.narrow != nullptr) {
            pool.narrow(line, to, pool.width);
          } else {
            for (int h = 0; h < pool.width; h++) assign(reinterpret_cast<Number*>(to)[h], line[h]);
          }
        }
      }
    }
  }
};

template <typename Threads, typename Number>
void run(Threads& threads, const Call<Number>& call, const Number* k, const Number* v, int64_t num_tokens) {
  call.write(k, false);
  if (v != nullptr) call.write(v, true);
  const int64_t used = call.rows.cu_q_lens[call.rows.number], line = call.heads * call.pool.value_width;
  const auto clear = [&](int64_t first, int64_t end) { std::fill(call.out + first * line, call.out + end * line, Number{}); };
  for (int row = 0; row < call.rows.number; row++) clear(call.rows.end(row), call.rows.cu_q_lens[row + 1]);
  clear(used, num_tokens);
  std::vector<float> partials;
  const std::vector<Job> jobs = call.make_jobs(partials);
  const int number = jobs.size();
  int64_t size = 0;
  for (const Job& job : jobs) size += int64_t(job.end - job.begin) * job.tokens * call.group;
  // A row's last tiles have the most keys.
  share(threads, number, size < kSmallCall, [&](int i) { call.walk(jobs[number - 1 - i]); });
  call.join(jobs);
}

ffi::Error attend(ffi::ThreadPool threads, Any q, Any k, Any v, Any kv, Integers page_table, Integers kv_lens,
                  Integers cu_q_lens, Integers num_missing, Integers numbers, Numbers scales, Numbers sinks, float scale, float softcap,
                  float log_length, int32_t first_key, ffi::Result<Any> out, ffi::Result<Any> kv_out) {
  if (kv.untyped_data() != kv_out->untyped_data()) return ffi::Error::Internal("XLA has copied the KV pool");
  const auto shape = kv.dimensions();
  const Rows rows{page_table.typed_data(), kv_lens.typed_data(), cu_q_lens.typed_data(), num_missing.typed_data(),
                  int64_t(kv_lens.element_count()), page_table.dimensions()[1], numbers.typed_data()[0]};
  const float* sink = sinks.element_count() > 0 ? sinks.typed_data() : nullptr;
  const Scoring scoring{scale, softcap, log_length, numbers.typed_data()[1], sink, first_key};
  const int heads = q.dimensions()[1];
  auto of_type = [&](auto zero) {
    using Number = decltype(zero);
    Pool<Number> pool{static_cast<uint8_t*>(kv.untyped_data()), shape[1], shape[2], shape[3], shape[4],
                      out->dimensions()[2], scales.typed_data()[0], scales.typed_data()[1], nullptr, nullptr};
    auto in_eight_bits = [&](auto kind) {
      pool.widen = widen<decltype(kind), Number>;
      pool.narrow = narrow<decltype(kind)>;
    };
    if (kv.element_type() == ffi::S8) in_eight_bits(Int8());
    if (kv.element_type() == ffi::F8E4M3FN) in_eight_bits(Float8<3>());
    if (kv.element_type() == ffi::F8E5M2) in_eight_bits(Float8<2>());
    const Call<Number> call{static_cast<const Number*>(q.untyped_data()), static_cast<Number*>(out->untyped_data()), heads,
                                int(heads / shape[1]), pool, rows, scoring};
    const Number* values = shape[2] > 1 ? static_cast<const Number*>(v.untyped_data()) : nullptr;
    run(threads, call, static_cast<const Number*>(k.untyped_data()), values, q.dimensions()[0]);
    return ffi::Error::Success();
  };
  return q.element_type() == ffi::F32 ? of_type(float()) : of_type(BFloat16());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sgl_jax_attention, attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Any>().Arg<Integers>().Arg<Integers>()
        .Arg<Integers>().Arg<Integers>().Arg<Integers>().Arg<Numbers>().Arg<Numbers>().Attr<float>("scale").Attr<float>("softcap")
        .Attr<float>("log_length").Attr<int32_t>("first_key").Ret<Any>().Ret<Any>());
