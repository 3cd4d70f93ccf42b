// Products of a few tokens with a matrix on CPUs, out[T, O] = x[T, I] w[O, I]^T, as one call of XLA's foreign-function interface.
//
// Up to kGroup tokens take no longer than the matrix takes to be read. So its rows are read as they lie, one after another, which
// is how processors fetch memory ahead by themselves; four rows at a time reach half of the bandwidth. With more tokens products
// bind, and four rows share what is read of the tokens.

#include <vector>

#include "products.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;

constexpr int kRows = 32;     // rows of the matrix that are a job
constexpr int kAhead = 1024;  // bytes of the matrix that are fetched ahead
constexpr int64_t kSmallCall = 1 << 17;  // products below which waking another thread costs more than it gains

// Numbers that are multiplied at once: a vector of floats.
struct FloatLanes {
  using Number = float;
  static constexpr int kNumbers = kLanes;
  template <typename Element>
  static inline Floats get(const Element* p) {
    return load(p);
  }
  static inline Floats add_product(Floats sum, Floats a, Floats b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// A vector of pairs of bfloat16, whose products are added up in float32.
struct PairLanes {
  using Number = BFloat16;
  static constexpr int kNumbers = 2 * kLanes;
  static inline __m512i get(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static inline Floats add_product(Floats sum, __m512i a, __m512i b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
template <typename Element>
using LanesOf = std::conditional_t<std::is_same_v<Element, BFloat16>, PairLanes, FloatLanes>;
#else
template <typename Element>
using LanesOf = FloatLanes;
#endif

template <typename Element, typename Out>
struct Product {
  using Lanes = LanesOf<Element>;
  const typename Lanes::Number* x;  // [T, I]
  const Element* w;                 // [O, I]
  Out* out;                         // [T, O]
  int64_t T, I, O;

  // sums[S, R], by lanes, of S rows with R tokens
  template <int S, int R>
  void multiply_block(const Element* rows, const typename Lanes::Number* tokens, Floats (*sums)[R]) const {
    const int64_t ahead = S == 1 ? kAhead / sizeof(Element) : 2 * S * I;
    Floats c[S][R] = {};
    for (int64_t i = 0; i < I; i += Lanes::kNumbers) {
      decltype(Lanes::get(rows)) a[S];
      for (int s = 0; s < S; s++) {
        __builtin_prefetch(rows + s * I + i + ahead);
        a[s] = Lanes::get(rows + s * I + i);
      }
      for (int r = 0; r < R; r++) {
        const auto b = Lanes::get(tokens + r * I + i);
        for (int s = 0; s < S; s++) c[s][r] = Lanes::add_product(c[s][r], a[s], b);
      }
    }
    std::copy(&c[0][0], &c[0][0] + S * R, &sums[0][0]);
  }

  void multiply_rows(int64_t begin, int64_t end) const {
    for (int64_t o = begin; o < end; o += kGroup) {
      const int number = std::min<int64_t>(kGroup, end - o);
      in_groups<kGroup>(T, [&](int t, auto r) {
        Floats sums[kGroup][r()] = {};
        if (T > kGroup && number == kGroup) {
          multiply_block<kGroup, r()>(w + o * I, x + t * I, sums);
        } else {
          for (int i = 0; i < number; i++) multiply_block<1, r()>(w + (o + i) * I, x + t * I, sums + i);
        }
        for (int j = 0; j < r(); j++) {
          const Quad found = sums_of(sums[0][j], sums[1][j], sums[2][j], sums[3][j]);
          for (int i = 0; i < number; i++) assign(out[(t + j) * O + o + i], found[i]);
        }
      });
    }
  }
};

template <typename Threads, typename Element, typename Out>
void multiply_dense(Threads& threads, const Element* x, const Element* w, Out* out, int64_t T, int64_t I, int64_t O) {
  using Number = typename LanesOf<Element>::Number;
  std::vector<Number> converted;
  const Number* lines;
  if constexpr (std::is_same_v<Number, Element>) {
    lines = x;
  } else {
    for (int64_t i = 0; i < T * I; i++) converted.push_back(to_float(x[i]));
    lines = converted.data();
  }
  const Product<Element, Out> product{lines, w, out, T, I, O};
  const int jobs = (O + kRows - 1) / kRows;
  share(threads, jobs, T * I * O < kSmallCall, [product](int i) {
    const int64_t begin = int64_t(i) * kRows;
    product.multiply_rows(begin, std::min(product.O, begin + kRows));
  });
}

ffi::Error run(ffi::ThreadPool threads, Any x, Any w, ffi::Result<Any> out) {
  const int64_t T = x.dimensions()[0], I = x.dimensions()[1], O = w.dimensions()[0];
  auto of_types = [&](auto element, auto result) {
    const auto* from = static_cast<const decltype(element)*>(x.untyped_data());
    const auto* matrix = static_cast<const decltype(element)*>(w.untyped_data());
    multiply_dense(threads, from, matrix, static_cast<decltype(result)*>(out->untyped_data()), T, I, O);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32) return of_types(float(), float());
  return out->element_type() == ffi::F32 ? of_types(BFloat16(), float()) : of_types(BFloat16(), BFloat16());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sgl_jax_dense, run,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Ret<Any>());
