// Products of tokens with a matrix on CPUs, out[T, O] = x[T, I] w[O, I]^T, as one call of XLA's foreign-function interface.
//
// A lane of a vector is a token, and nothing is added up across lanes: tokens are packed first. Of fewer tokens than lanes
// each has P lanes side by side, for P units of a row. A block of rows shares what is read of the tokens. Meanwhile the rows
// behind it are fetched as they lie in memory; fetched side by side they would come at half of the rate.

#include <vector>

#include "products.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;

constexpr int kRows = 32;                       // rows of the matrix that are a job
constexpr int kFewTokens = kLanes == 4 ? 4 : 2;  // tokens that take no longer than the matrix takes to be read
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

struct alignas(kLanes * 4) Line {
  uint32_t units[kLanes];
};

template <typename Element, typename Out>
struct Product {
  using U = UnitOf<Element>;
  using Unit = typename U::Unit;
  const Element* x;  // [T, I]
  const Element* w;  // [O, I]
  Out* out;          // [T, O]
  int64_t T, I, O;

  int64_t units() const { return I / U::kNumbers; }

  // Packs tokens as [units / P, vectors * kLanes / P, P], a square at a time, which stays in the nearest cache.
  template <int P>
  void pack(Unit* to, int64_t width, int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < units(); first += kLanes) {
      for (int64_t t = begin; t < end; t++) {
        for (int64_t i = first; i < first + kLanes; i++) to[i / P * width + t * P + i % P] = U::of_key(x + t * I, i);
      }
    }
  }

  // Rows of the matrix as units, or as they are where `spread` makes units of them.
  template <int P>
  auto rows(int64_t row, int number) const {
    const Element* from = w + row * I;
    if constexpr (sizeof(Unit) == U::kNumbers * sizeof(Element)) {
      return reinterpret_cast<const Unit*>(from);
    } else if constexpr (P == kLanes) {
      return from;
    } else {
      float* to = scratch(number * I);
      for (int64_t i = 0; i < number * I; i += kLanes) store(to + i, load(from + i));
      return static_cast<const float*>(to);
    }
  }

  // Multiplies R rows with X vectors of tokens, the first of which is t.
  template <int P, int X, int R>
  void multiply_block(const Unit* tokens, int64_t width, int64_t t, int64_t row) const {
    constexpr int kTokens = X * kLanes / P, kBytes = R * P * U::kNumbers * sizeof(Element);
    float sums[R * kTokens * P];
    Out found[R * kTokens];
    const char* ahead = reinterpret_cast<const char*>(w + (row + R) * I);
    const auto fetch = [&](int i) {
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + i * kBytes + line, 0, 2);
    };
    const int steps = units() / P;
    multiply_columns<R, X, U, P>(rows<P>(row, R), units(), tokens + t * P, width, steps, sums, X * kLanes, false, fetch);
    for (int i = 0; i < R * kTokens; i++) {
      float sum = sums[i * P];
      for (int p = 1; p < P; p++) sum += sums[i * P + p];
      assign(found[i], sum);
    }
    for (int i = 0; i < std::min<int64_t>(kTokens, T - t); i++) {
      for (int r = 0; r < R; r++) out[(t + i) * O + row + r] = found[r * kTokens + i];
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
      constexpr int kMost = P == 1 ? kVectors : P == kLanes ? kFewTokens : 1;
      in_groups<kMost>(vectors, [&](int first, auto x) {
        constexpr int kBlock = P == kLanes ? 1 : block_of(x());
        const int64_t end = std::min<int64_t>(O, (job + int64_t(1)) * kRows);
        int64_t row = int64_t(job) * kRows;
        for (; row + kBlock <= end; row += kBlock) multiply_block<P, x(), kBlock>(tokens, width, first * kLanes / P, row);
        for (; row < end; row++) multiply_block<P, x(), 1>(tokens, width, first * kLanes / P, row);
      });
    });
  }

  // Takes as many lanes a token as a vector has room for.
  template <int P, typename Threads>
  void run_widest(Threads& threads) const {
    if constexpr (P > 1) {
      if (T * P > kLanes) return run_widest<P / 2>(threads);
    }
    run<P>(threads);
  }
};

ffi::Error run(ffi::ThreadPool threads, Any x, Any w, ffi::Result<Any> out) {
  const int64_t T = x.dimensions()[0], I = x.dimensions()[1], O = w.dimensions()[0];
  auto of_types = [&](auto element, auto result) {
    const auto* from = static_cast<const decltype(element)*>(x.untyped_data());
    const auto* matrix = static_cast<const decltype(element)*>(w.untyped_data());
    auto* to = static_cast<decltype(result)*>(out->untyped_data());
    const Product<decltype(element), decltype(result)> product{from, matrix, to, T, I, O};
    T > kFewTokens ? product.template run_widest<kLanes / 4>(threads) : product.template run<kLanes>(threads);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32) return of_types(float(), float());
  return out->element_type() == ffi::F32 ? of_types(BFloat16(), float()) : of_types(BFloat16(), BFloat16());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sgl_jax_dense, run,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Ret<Any>());
