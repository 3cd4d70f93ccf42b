// Products of a few lines with keys, values or the rows of a matrix.

#pragma once

#include <type_traits>

#include "vectors.h"

namespace {

constexpr int kBlock = 128;  // keys of a block
constexpr int kGroup = 4;    // lines that are multiplied together

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Calls f(i, R) for lines [i, i + R) of all, R <= Most as a compile-time constant.
template <int Most, typename F>
inline void in_groups(int lines, F f) {
  int i = 0;
  for (; lines - i >= Most; i += Most) f(i, std::integral_constant<int, Most>());
  if constexpr (Most > 1) in_groups<Most - 1>(lines - i, [&](int j, auto r) { f(i + j, r); });
}

// --- K and V where they lie in the pool ------------------------------------------------------------------------------

// Keys, or vectors of values, that are multiplied together with so many lines: registers hold their sums, four or a multiple.
constexpr int together(int lines) { return lines > 3 && kLanes < 16 ? 2 : 4; }

// scores[R, n] = q[R, width] keys[n, width]; lines of scores are kBlock long. Four sums are added up across lanes together.
template <int R, typename Element>
inline void multiply_keys(const float* q, const Element* keys, int n, int width, float* scores) {
  constexpr int K = together(R);
  for (int j = 0; j < n; j += K) {
    const int64_t last = n - 1 - j;  // keys behind it are the last one again, and their scores are not stored
    const Element* at[K];
    for (int k = 0; k < K; k++) at[k] = keys + (j + std::min<int64_t>(k, last)) * width;
    Floats sums[R * K];
    for (int i = 0; i < R * K; i++) sums[i] = Floats{};
    for (int h = 0; h < width; h += kLanes) {
      Floats key[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) key[k] = load(at[k] + h);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Floats x = load(q + r * width + h);
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) sums[r * K + k] += key[k] * x;
      }
    }
    float found[R * K];
#pragma GCC unroll 4
    for (int i = 0; i < R * K; i += 4) {
      const Quad four = sums_of(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
      std::memcpy(found + i, &four, sizeof(four));
    }
    for (int r = 0; r < R; r++) std::memcpy(scores + r * kBlock + j, found + r * K, 4 * std::min<int64_t>(K, last + 1));
  }
}

// sums[R, X vectors] += weights[R, n] values[n, X vectors]
template <int R, int X, typename Element>
inline void add_columns(const float* weights, const Element* values, int n, int width, float* sums, int sums_width) {
  Floats c[R][X];
  for (int r = 0; r < R; r++) {
    for (int x = 0; x < X; x++) c[r][x] = load(sums + r * sums_width + x * kLanes);
  }
  for (int j = 0; j < n; j++) {
    for (int x = 0; x < X; x++) {
      const Floats value = load(values + int64_t(j) * width + x * kLanes);
      for (int r = 0; r < R; r++) c[r][x] += weights[r * kBlock + j] * value;
    }
  }
  for (int r = 0; r < R; r++) {
    for (int x = 0; x < X; x++) store(sums + r * sums_width + x * kLanes, c[r][x]);
  }
}

// sums[R, columns] += weights[R, n] values[n, columns], with rows of values `width` apart.
template <int R, typename Element>
inline void add_values(const float* weights, const Element* values, int n, int width, int columns, float* sums,
                       int sums_width) {
  constexpr int X = together(R);
  int h = 0;
  for (; h + X * kLanes <= columns; h += X * kLanes) add_columns<R, X>(weights, values + h, n, width, sums + h, sums_width);
  for (; h < columns; h += kLanes) add_columns<R, 1>(weights, values + h, n, width, sums + h, sums_width);
}

// --- Packed K and V --------------------------------------------------------------------------------------------------

// What a packed block consists of: floats.
struct FloatUnit {
  using Unit = float;
  using Number = float;
  using Sum = float;
  static constexpr int kNumbers = 1;
  template <typename Element>
  static inline Floats of_row(const Element* row) {
    return load(row);
  }
  static inline Floats add_product(Floats sum, Floats a, const Unit* b) { return sum + a * load(b); }
  template <typename Element>
  static inline Unit of_key(const Element* key, int i) {
    return to_float(key[i]);
  }
  template <typename Element>
  static inline void pack_values(Unit* to, const Element* row, const Element*, int width) {
    for (int i = 0; i < width; i++) to[i] = to_float(row[i]);
  }
  static inline void pack_line(Unit* to, const float* line, int n) { std::copy(line, line + n, to); }
};

#if defined(__AVX512BF16__)
// Or pairs of bfloat16, whose products are added up in float32. Values are paired with those of the next key.
struct PairUnit {
  using Unit = uint32_t;
  using Number = BFloat16;
  using Sum = float;
  static constexpr int kNumbers = 2;
  static inline Floats of_row(const int8_t* row) {
    return (Floats)_mm512_cvtne2ps_pbh((__m512)load(row + kLanes), (__m512)load(row));
  }
  static inline Unit pair(BFloat16 x, BFloat16 y) { return x.bits | uint32_t(y.bits) << 16; }
  static inline Floats add_product(Floats sum, Floats a, const Unit* b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_loadu_si512(b));
  }
  static inline Unit of_key(const BFloat16* key, int i) { return pair(key[2 * i], key[2 * i + 1]); }
  static inline void pack_values(Unit* to, const BFloat16* row, const BFloat16* next, int width) {
    for (int i = 0; i < width; i++) to[i] = pair(row[i], next[i]);
  }
  static inline void pack_line(Unit* to, const float* line, int n) {
    for (int i = 0; i < n; i += 2) {
      BFloat16 x, y;
      assign(x, line[i]);
      assign(y, line[i + 1]);
      to[i / 2] = pair(x, y);
    }
  }
};
#endif

// The numbers of a row that make a unit, as they are stored. A vector of units is made where they are multiplied.
template <typename U, typename Element>
struct Stored {
  Element numbers[U::kNumbers];
};
template <int P, typename U, typename Element>
inline Floats spread(const Stored<U, Element>* units) {
  static_assert(P == kLanes);
  return U::of_row(units->numbers);
}

// sums[R, X vectors] (+)= a[R, steps] b[steps, X vectors], in units. A step multiplies P units of a row: the lanes of b then
// hold P units of a column side by side. Calls fetch(step) on the way.
template <int R, int X, typename U, int P, typename A, typename F>
inline void multiply_columns(const A* a, int64_t a_width, const typename U::Unit* b, int64_t b_width, int steps,
                             float* sums, int sums_width, bool accumulate, F fetch) {
  Floats c[R][X];
  for (int r = 0; r < R; r++) {
    for (int x = 0; x < X; x++) c[r][x] = accumulate ? load(sums + r * sums_width + x * kLanes) : Floats{};
  }
  for (int i = 0; i < steps; i++) {
    fetch(i);
    for (int r = 0; r < R; r++) {
      const Floats units = spread<P>(a + r * a_width + i * P);
      for (int x = 0; x < X; x++) c[r][x] = U::add_product(c[r][x], units, b + i * b_width + x * kLanes);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int x = 0; x < X; x++) store(sums + r * sums_width + x * kLanes, c[r][x]);
  }
}

// sums[R, columns] (+)= a[R, steps] b[steps, columns], in units; the columns are a multiple of four vectors.
template <int R, typename U>
inline void multiply(const typename U::Unit* a, int a_width, const typename U::Unit* b, int b_width, int steps, float* sums,
                     int sums_width, int columns, bool accumulate) {
  for (int i = 0; i < columns; i += 4 * kLanes) {
    multiply_columns<R, 4, U, 1>(a, a_width, b + i, b_width, steps, sums + i, sums_width, accumulate, [](int) {});
  }
}

}  // namespace
