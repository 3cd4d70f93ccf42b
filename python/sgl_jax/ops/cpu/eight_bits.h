// Numbers of eight bits, as a KV pool may hold them: int8, and the floats E4M3 (without infinities) and E5M2.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

// A kind of number: Floats of(bytes), and the byte of a float, rounded to the nearest and cut at the largest.
struct Int8 {
  static inline Floats of(const uint8_t* x) { return load(reinterpret_cast<const int8_t*>(x)); }
  static inline uint8_t rounded(float x) { return int8_t(std::nearbyint(std::max(-127.0f, std::min(127.0f, x)))); }
};

template <int Mantissa>
struct Float8 {
  static constexpr int kShift = 23 - Mantissa, kBias = Mantissa == 3 ? 7 : 15;
  static constexpr float kLargest = Mantissa == 3 ? 448 : 57344, kLeast = Mantissa == 3 ? 0x1p-6f : 0x1p-14f;  // normal

  static inline Floats of(const uint8_t* x) {
    const Bits wide = (Bits)widen(reinterpret_cast<const int8_t*>(x)), rest = (wide & 127) << kShift;
    const Floats normal = (Floats)(rest + (uint32_t(127 - kBias) << 23));
    const Floats small = (Floats)(rest + (uint32_t(128 - kBias) << 23)) - kLeast;  // without an implicit one
    return (Floats)((Bits)select((Ints)(rest < (1u << 23)), small, normal) | (wide & 128) << 24);
  }
  static inline uint8_t rounded(float x) {
    const float size = std::min(std::fabs(x), kLargest);
    uint32_t code;
    if (size < kLeast) {
      code = std::nearbyint(size * ((1 << Mantissa) / kLeast));
    } else {
      std::memcpy(&code, &size, 4);
      code = ((code + (1u << (kShift - 1)) - 1 + (code >> kShift & 1)) >> kShift) - (uint32_t(127 - kBias) << Mantissa);
    }
    return code | (std::signbit(x) ? 128 : 0);
  }
};

inline void store(BFloat16* p, Floats x) {  // numbers of eight bits need no rounding
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector((Bits)x >> 16, Halves);
}

// to[i] = from[i] for n numbers.
template <typename Kind, typename Number>
void widen(const uint8_t* from, Number* to, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, Kind::of(from + i));
  if (i == n) return;
  uint8_t rest[kLanes] = {};
  Number wide[kLanes];
  std::memcpy(rest, from + i, n - i);
  store(wide, Kind::of(rest));
  std::copy(wide, wide + n - i, to + i);
}

template <typename Kind>
void narrow(const float* from, uint8_t* to, int n) {
  for (int i = 0; i < n; i++) to[i] = Kind::rounded(from[i]);
}

}  // namespace
