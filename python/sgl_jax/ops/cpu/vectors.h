// Numbers and vectors of the instruction set that the compiler is told to use.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint64_t Words __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t QuadIndex __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadIndex{__VA_ARGS__})
#endif

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void assign(float& to, float x) { to = x; }
inline void assign(BFloat16& to, float x) {  // rounds to nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 64;
}

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline Floats load(const BFloat16* p) {
#if defined(__AVX512F__)  // GCC 12 makes two halves of the general form
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
#endif
}
// GCC 12 converts bytes one by one in the general form.
inline Ints widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Ints);
#endif
}
inline Floats load(const int8_t* p) { return __builtin_convertvector(widen(p), Floats); }
inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }

// Fills the lanes with P 32-bit units, again and again.
template <int P>
inline Floats spread(const void* units) {
  static_assert(P <= 2 || P == kLanes || (P == 4 && kLanes == 16));
  if constexpr (P == kLanes) return *static_cast<const Floats*>(units);
#if defined(__AVX512F__)
  if constexpr (P == 4) return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(units)));
#endif
  std::conditional_t<P == 1, uint32_t, uint64_t> unit;
  std::memcpy(&unit, units, sizeof(unit));
  return (Floats)(std::conditional_t<P == 1, Bits, Words>{} + unit);
}

inline Floats all(float x) { return x - Floats{}; }
inline Floats select(Ints mask, Floats x, Floats y) { return (Floats)(((Ints)x & mask) | ((Ints)y & ~mask)); }
inline Floats larger(Floats x, Floats y) { return select(x > y, x, y); }
inline float largest(Floats x) {
  float found = x[0];
  for (int i = 1; i < kLanes; i++) found = std::max(found, x[i]);
  return found;
}

// Adds up the quarters of a vector, or its halves: four floats, or four integers.
template <typename Four, typename Vector>
inline Four folded(Vector x) {
  Four quads[kLanes / 4], total;
  std::memcpy(quads, &x, sizeof(x));
  total = quads[0];
  for (int i = 1; i < kLanes / 4; i++) total += quads[i];
  return total;
}

// The sums of four vectors' lanes.
template <typename Four = Quad, typename Vector>
inline Four sums_of(Vector a, Vector b, Vector c, Vector d) {
  const Four w = folded<Four>(a), x = folded<Four>(b), y = folded<Four>(c), z = folded<Four>(d);
  const Four wx = SHUFFLE(w, x, 0, 4, 1, 5) + SHUFFLE(w, x, 2, 6, 3, 7);
  const Four yz = SHUFFLE(y, z, 0, 4, 1, 5) + SHUFFLE(y, z, 2, 6, 3, 7);
  return SHUFFLE(wx, yz, 0, 1, 4, 5) + SHUFFLE(wx, yz, 2, 3, 6, 7);
}
inline float sum_of(Floats x) { return sums_of(x, x, x, x)[0]; }

// e to the power of x, for x <= 0: 2^n times a polynomial of the rest, as in Cephes' expf. The relative error is below 2e-7.
inline Floats exp_of_negative(Floats x) {
  x = larger(x, all(-87.0f));
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // truncation rounds negatives up
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  return (p * r * r + r + 1.0f) * (Floats)((n + 127) << 23);
}

inline Floats tanh_of(Floats x) {
  const Ints negative = x < 0.0f;
  const Floats e = exp_of_negative(select(negative, x, -x) * 2.0f), t = (1.0f - e) / (1.0f + e);
  return select(negative, -t, t);
}

}  // namespace
