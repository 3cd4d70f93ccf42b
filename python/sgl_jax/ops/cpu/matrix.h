// Products of tokens with the rows of a matrix, out[T, O] = x[T, I] w[O, I]^T, in the units of products.h.
//
// A lane of a vector is a token, and nothing is added up across lanes: tokens are packed first. Of few tokens each has P lanes
// side by side, for P units of a row. A block of rows shares what is read of the tokens. Meanwhile the rows
// behind it are fetched as they lie in memory; fetched side by side they would come at half of the rate.

#pragma once

#include <vector>

#include "products.h"
#include "threads.h"

namespace {

constexpr int kRows = 32;                       // rows of the matrix that are a job
constexpr int kFewTokens = kLanes == 16 ? 8 : 6;  // tokens that are multiplied with all lanes for units of one token
constexpr int kFilled = kLanes == 16 ? 1 : 2;   // vectors of tokens that have several lanes each
constexpr int kVectors = kLanes == 16 ? 4 : 3;  // of tokens, that are multiplied together
constexpr int64_t kSmallCall = 1 << 17;         // products below which waking another thread costs more than it gains
constexpr int64_t kSmallPack = 1 << 15;         // numbers of tokens, likewise

// Rows that are multiplied with so many vectors: their sums fill registers, of which wide vectors have more.
constexpr int block_of(int vectors) { return vectors * 8 <= (kLanes == 16 ? 16 : 8) ? 8 : 4; }

#if defined(__AVX512BF16__)
template <typename Element>
using UnitOf = std::conditional_t<std::is_same_v<Element, BFloat16>, PairUnit, FloatUnit>;
#else
template <typename Element>
using UnitOf = FloatUnit;
#endif

// Rows that are multiplied with so many tokens where the lanes of a vector are units of one token. A processor can add to eight sums
// at a time; more rows would take more registers than there are, 32 wide ones or 16.
constexpr int rows_across(int tokens) {
  return kLanes == 16 ? (tokens < 8 ? 4 : 2) : tokens < 4 ? 4 : tokens < 5 ? 2 : 1;
}

struct alignas(kLanes * 4) Line {
  uint32_t units[kLanes];
};

// An array of float or bfloat16, [tokens, rows of the matrix].
struct Output {
  void* data;
  bool is_float;
  int64_t O;

  void clear(int64_t token) const {
    const int64_t bytes = O * (is_float ? 4 : 2);
    std::memset(static_cast<char*>(data) + token * bytes, 0, bytes);
  }
};

// The tokens that are multiplied. Results of the others are zeros.
struct Tokens {
  std::vector<int32_t> at;  // their indices, and zeros for the lanes behind them
  int64_t number = 0;       // of them

  Tokens(const bool* live, int64_t all, const Output& out) : at(all + kLanes) {
    for (int64_t t = 0; t < all; t++) {
      if (live[t]) {
        at[number++] = t;
      } else {
        out.clear(t);
      }
    }
  }
};

// U makes units of a token's numbers and of a row's. Result is a function (sum, token, row) that gives the product.
template <typename U, typename Number, typename Weight, typename Result>
struct Product {
  using Unit = typename U::Unit;
  using Sum = typename U::Sum;
  const Number* x;    // [all tokens, I]
  const Weight* w;    // [O, I]
  Output out;         // [all tokens, O]
  const int32_t* at;  // of Tokens
  int64_t T, I, O;
  Result result;

  int64_t units() const { return I / U::kNumbers; }

  // Packs tokens as [units / P, vectors * kLanes / P, P], a square at a time, which stays in the nearest cache.
  template <int P>
  void pack(Unit* to, int64_t width, int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < units(); first += kLanes) {
      for (int64_t t = begin; t < end; t++) {
        for (int64_t i = first; i < first + kLanes; i++) to[i / P * width + t * P + i % P] = U::of_key(x + at[t] * I, i);
      }
    }
  }

  // Rows of the matrix as units, or as they are where `spread` makes units of them.
  template <int P>
  auto rows(int64_t row, int number) const {
    const Weight* from = w + row * I;
    if constexpr (std::is_same_v<Weight, typename U::Number>) {
      return reinterpret_cast<const Unit*>(from);
    } else if constexpr (P == kLanes) {
      return reinterpret_cast<const Stored<U, Weight>*>(from);
    } else {
      Unit* to = reinterpret_cast<Unit*>(scratch(number * units()));
      for (int64_t i = 0; i < number * units(); i += kLanes) {
        store(reinterpret_cast<float*>(to + i), U::of_row(from + i * U::kNumbers));
      }
      return static_cast<const Unit*>(to);
    }
  }

  // Multiplies R rows with X vectors of tokens, the first of which is t.
  template <int P, int X, int R>
  void multiply_block(const Unit* tokens, int64_t width, int64_t t, int64_t row) const {
    constexpr int kTokens = X * kLanes / P, kBytes = R * P * U::kNumbers * sizeof(Weight);
    Sum sums[R * kTokens * P];
    const char* ahead = reinterpret_cast<const char*>(w + (row + R) * I);
    const auto fetch = [&](int i) {
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + i * kBytes + line, 0, 2);
    };
    const int steps = units() / P;
    multiply_columns<R, X, U, P>(rows<P>(row, R), units(), tokens + t * P, width, steps, reinterpret_cast<float*>(sums),
                                 X * kLanes, false, fetch);
    Sum totals[R * kTokens];
    add_lanes<P>(sums, totals);
    float found[R * kTokens];
    for (int i = 0; i < R * kTokens; i++) found[i] = result(totals[i], at[t + i % kTokens], row + i / kTokens);
    const int number = std::min<int64_t>(kTokens, T - t);
    out.is_float ? write<float, R>(found, t, number, row) : write<BFloat16, R>(found, t, number, row);
  }

  // Adds up the P lanes of each of N products, in an order that does not depend on N.
  template <int P, int N>
  static void add_lanes(const Sum* sums, Sum (&totals)[N]) {
    if constexpr (P == kLanes) {
      using Vector = std::conditional_t<std::is_same_v<Sum, float>, Floats, Ints>;
      using Four = std::conditional_t<std::is_same_v<Sum, float>, Quad, QuadIndex>;
      const auto of = [&](int i) {  // a template's argument loses its alignment of 4, so that nothing may point to a Vector
        Vector lanes;
        std::memcpy(&lanes, sums + std::min(i, N - 1) * kLanes, sizeof(lanes));
        return lanes;
      };
      for (int i = 0; i < N; i += 4) {
        const Four four = sums_of<Four>(of(i), of(i + 1), of(i + 2), of(i + 3));
        std::memcpy(totals + i, &four, sizeof(Sum) * std::min(4, N - i));
      }
    } else {
      for (int i = 0; i < N; i++) {
        totals[i] = sums[i * P];
        for (int p = 1; p < P; p++) totals[i] += sums[i * P + p];
      }
    }
  }

  // Writes the products of R rows with tokens [t, t + number).
  template <typename To, int R, int N>
  void write(const float (&found)[N], int64_t t, int number, int64_t row) const {
    To rounded[N];
    for (int i = 0; i < N; i++) assign(rounded[i], found[i]);
    To* to = static_cast<To*>(out.data) + row;
    for (int i = 0; i < number; i++) {
      for (int r = 0; r < R; r++) to[at[t + i] * O + r] = rounded[r * (N / R) + i];
    }
  }

  template <int P, typename Threads>
  void run(Threads& threads) const {
    const int vectors = (T * P + kLanes - 1) / kLanes;
    const int64_t width = vectors * kLanes;
    std::vector<Line> lines(units() / P * vectors);
    Unit* tokens = reinterpret_cast<Unit*>(lines.data());
    share(threads, (T + kLanes - 1) / kLanes, T * I < kSmallPack, [*this, tokens, width](int i) {
      pack<P>(tokens, width, i * kLanes, std::min<int64_t>(T, (i + 1) * kLanes));
    });
    share(threads, (O + kRows - 1) / kRows, T * I * O < kSmallCall, [*this, tokens, width, vectors](int job) {
      constexpr int kMost = P == 1 ? kVectors : P == kLanes ? kFewTokens : kFilled;
      in_groups<kMost>(vectors, [&](int first, auto x) {
        constexpr int kBlock = P == kLanes ? rows_across(x()) : block_of(x());
        const int64_t end = std::min<int64_t>(O, (job + int64_t(1)) * kRows);
        int64_t row = int64_t(job) * kRows;
        for (; row + kBlock <= end; row += kBlock) multiply_block<P, x(), kBlock>(tokens, width, first * kLanes / P, row);
        for (; row < end; row++) multiply_block<P, x(), 1>(tokens, width, first * kLanes / P, row);
      });
    });
  }

  // Takes as many lanes a token as kFilled vectors have room for.
  template <int P, typename Threads>
  void run_widest(Threads& threads) const {
    if constexpr (P > 1) {
      if (T * P > kFilled * kLanes) return run_widest<P / 2>(threads);
    }
    run<P>(threads);
  }

  template <typename Threads>
  void share_rows(Threads& threads) const {
    T > kFewTokens ? run_widest<kLanes / 4>(threads) : run<kLanes>(threads);
  }
};

}  // namespace
