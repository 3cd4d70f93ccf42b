// Products of tokens with a matrix of int8 and a scale for each row, as one call of XLA's foreign-function interface.
//
// Tokens are rounded to int8, too, each with a scale of its own; the products are then exact sums of integers. Or they stay as
// they are, and the values are converted where they are multiplied. The contract is that of ops/quantized_matmul/api.py.

#include <cmath>

#include "matrix.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using Bools = ffi::Buffer<ffi::PRED>;
using Scales = ffi::Buffer<ffi::F32>;

#if defined(__AVX512VNNI__)
// Four int8. The instruction multiplies unsigned numbers with signed ones, so those of a row are raised by kRaised.
struct IntegerUnit {
  using Unit = uint32_t;
  using Number = int8_t;
  using Sum = int32_t;
  static constexpr int kNumbers = 4, kRaised = 128;
  static inline Floats add_product(Floats sum, Floats a, const Unit* b) {
    const __m512i raised = _mm512_xor_si512((__m512i)a, _mm512_set1_epi8(-128));
    return (Floats)_mm512_dpbusd_epi32((__m512i)sum, raised, _mm512_loadu_si512(b));
  }
  static inline Unit of_key(const int8_t* token, int i) {
    Unit unit;
    std::memcpy(&unit, token + 4 * i, 4);
    return unit;
  }
};
#else
// Two int16.
struct IntegerUnit {
  using Unit = uint32_t;
  using Number = int16_t;
  using Sum = int32_t;
  static constexpr int kNumbers = 2, kRaised = 0;
  static inline Floats add_product(Floats sum, Floats a, const Unit* b) {
    const Floats tokens = load(reinterpret_cast<const float*>(b));
#if defined(__AVX512BW__)
    return (Floats)((Ints)sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)tokens));
#elif defined(__AVX2__)
    return (Floats)((Ints)sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)tokens));
#elif defined(__SSE2__)
    return (Floats)((Ints)sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)tokens));
#else
    const Ints low = ((Ints)a << 16 >> 16) * ((Ints)tokens << 16 >> 16);
    return (Floats)((Ints)sum + low + ((Ints)a >> 16) * ((Ints)tokens >> 16));
#endif
  }
  static inline Floats of_row(const int8_t* row) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
#else
    int16_t wide[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; i++) wide[i] = row[i];
    return load(reinterpret_cast<const float*>(wide));
#endif
  }
  static inline Unit of_key(const int8_t* token, int i) {
    return uint16_t(token[2 * i]) | uint32_t(uint16_t(token[2 * i + 1])) << 16;
  }
};
#endif

struct Matrix {
  const int8_t* values;  // [O, I]
  const float* scales;   // [O]
  int64_t O, I;
};

// The bits of a number without its sign, which are ordered as the magnitudes are, with NaN behind infinity.
inline int32_t magnitude(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

// Tokens as value * size.
struct Rounded {
  std::vector<int8_t> values;  // [all tokens, I]
  std::vector<float> sizes;     // of each token
  std::vector<int32_t> raised;  // by how much the raised values of any row raise a sum

  Rounded(int64_t tokens, int64_t width) : values(tokens * width), sizes(tokens), raised(tokens) {}

  template <typename Number>
  void round(const Number* from, int64_t token, int64_t width) {
    int8_t* to = &values[token * width];
    int32_t top = 0, total = 0;
    for (int64_t i = 0; i < width; i++) top = std::max(top, magnitude(to_float(from[i])));
    float& size = sizes[token];
    std::memcpy(&size, &top, 4);
    size = (top == 0 ? 1 : size) * (1 / 127.0f);  // multiplied by inverses, as XLA divides
    const float inverse = 1 / size;
    for (int64_t i = 0; i < width; i++) {
      const int32_t whole = std::rint(to_float(from[i]) * inverse);
      to[i] = whole;
      total += whole;
    }
    raised[token] = total * IntegerUnit::kRaised;
  }
};

template <typename Threads, typename Number>
void multiply(Threads& threads, const Number* x, const Tokens& tokens, const Matrix& w, const Output& out) {
  const auto scaled = [scales = w.scales](float sum, int64_t, int64_t row) { return sum * scales[row]; };
  const Product<UnitOf<Number>, Number, int8_t, decltype(scaled)> product{
      x, w.values, out, tokens.at.data(), tokens.number, w.I, w.O, scaled};
  product.share_rows(threads);
}

template <typename Threads>
void multiply(Threads& threads, const Rounded& x, const Tokens& tokens, const Matrix& w, const Output& out) {
  const auto scaled = [&x, &w](int32_t sum, int64_t token, int64_t row) {
    return float(sum - x.raised[token]) * w.scales[row] * x.sizes[token];
  };
  const Product<IntegerUnit, int8_t, int8_t, decltype(scaled)> product{
      x.values.data(), w.values, out, tokens.at.data(), tokens.number, w.I, w.O, scaled};
  product.share_rows(threads);
}

template <typename Threads, typename Number>
ffi::Error run_with(Threads& threads, const Number* x, int64_t all, const Tokens& tokens, const Matrix& w, bool rounded,
                    const Output& out) {
  if (!rounded) {
    multiply(threads, x, tokens, w, out);
    return ffi::Error::Success();
  }
  const int64_t T = tokens.number;
  Rounded values(all, w.I);
  share(threads, (T + kLanes - 1) / kLanes, T * w.I < kSmallPack, [&values, &tokens, x, T, I = w.I](int64_t job) {
    for (int64_t t = job * kLanes; t < std::min(T, (job + 1) * kLanes); t++) {
      values.round(x + tokens.at[t] * I, tokens.at[t], I);
    }
  });
  multiply(threads, values, tokens, w, out);
  return ffi::Error::Success();
}

ffi::Error run(ffi::ThreadPool threads, Any x, Any values, Scales scales, Bools live, bool rounded, ffi::Result<Any> result) {
  const Matrix w{static_cast<const int8_t*>(values.untyped_data()), scales.typed_data(), values.dimensions()[0], values.dimensions()[1]};
  const Output out{result->untyped_data(), result->element_type() == ffi::F32, w.O};
  const int64_t all = x.dimensions()[0];
  const Tokens tokens(live.typed_data(), all, out);
  const auto with = [&](const auto* numbers) { return run_with(threads, numbers, all, tokens, w, rounded, out); };
  if (x.element_type() == ffi::F32) return with(static_cast<const float*>(x.untyped_data()));
  return with(static_cast<const BFloat16*>(x.untyped_data()));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sgl_jax_quantised, run,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Scales>().Arg<Bools>().Attr<bool>("rounded").Ret<Any>());
