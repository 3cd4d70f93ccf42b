// LoRA adapters' addends to products on CPUs, as one call of XLA's foreign-function interface: y += (x A^T) B of each token's
// own adapter, in place. Tokens of one adapter are taken a few at a time, so that its numbers are read once for them.

#include <vector>

#include "products.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;

struct Group {
  int slot, number;
  int64_t tokens[kGroup];
};

// Collects the tokens of each slot. Tokens of none, whose slot is -1, are left out.
std::vector<Group> groups_of(const int32_t* slots, int64_t T, int A) {
  std::vector<Group> groups;
  std::vector<int> open(A, -1);  // the group of each slot that has room
  for (int64_t t = 0; t < T; t++) {
    const int slot = slots[t];
    if (slot < 0) continue;
    if (open[slot] < 0 || groups[open[slot]].number == kGroup) {
      open[slot] = groups.size();
      groups.push_back({slot, 0, {}});
    }
    Group& group = groups[open[slot]];
    group.tokens[group.number++] = t;
  }
  return groups;
}

// For each part a slot has R rows of A, [R, I], and of B, [R, O].
template <typename Element>
struct Addends {
  const Element* x;  // [T, I]
  const Element* a;  // [P, A * R, I]
  std::vector<const Element*> b;
  std::vector<int64_t> columns;  // of each part
  Element* y;                    // [T, all columns]
  int64_t I, A, R, width;

  template <int N>
  void add(const Group& group) const {
    const int64_t parts = b.size();
    float* lines = scratch(N * (I + width + kBlock));
    float *sums = lines + N * I, *h = sums + N * width;
    for (int n = 0; n < N; n++) {
      for (int64_t i = 0; i < I; i++) lines[n * I + i] = to_float(x[group.tokens[n] * I + i]);
    }
    std::fill(sums, h, 0.0f);
    float* to = sums;
    for (int64_t p = 0; p < parts; to += columns[p++]) {
      for (int64_t r = 0; r < R; r += kBlock) {
        const int rank = std::min<int64_t>(kBlock, R - r);
        multiply_keys<N>(lines, a + ((p * A + group.slot) * R + r) * I, rank, I, h);
        add_values<N>(h, b[p] + (group.slot * R + r) * columns[p], rank, columns[p], columns[p], to, width);
      }
    }
    for (int n = 0; n < N; n++) {
      Element* line = y + group.tokens[n] * width;
      for (int64_t o = 0; o < width; o++) assign(line[o], to_float(line[o]) + sums[n * width + o]);
    }
  }
};

template <typename Element>
ffi::Error run_as(ffi::ThreadPool& threads, const Any& x, const int32_t* slots, const Any& a, int64_t A,
                  const ffi::RemainingArgs& b, Any& y) {
  const int64_t T = x.dimensions()[0], width = y.dimensions()[1];
  Addends<Element> addends{static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(a.untyped_data()), {}, {},
                           static_cast<Element*>(y.untyped_data()), x.dimensions()[1], A, a.dimensions()[1] / A, width};
  for (size_t p = 0; p < b.size(); p++) {
    const Any part = *b.get<Any>(p);
    addends.b.push_back(static_cast<const Element*>(part.untyped_data()));
    addends.columns.push_back(part.dimensions()[1]);
  }
  const std::vector<Group> groups = groups_of(slots, T, A);
  share(threads, groups.size(), groups.size() < 2, [&addends, &groups](int i) {
    in_groups<kGroup>(groups[i].number, [&](int, auto n) { addends.template add<n()>(groups[i]); });
  });
  return ffi::Error::Success();
}

// The result is the first argument's buffer.
ffi::Error run(ffi::ThreadPool threads, int64_t A, Any, Any x, ffi::Buffer<ffi::S32> slots, Any a, ffi::RemainingArgs b,
               ffi::Result<Any> y) {
  return x.element_type() == ffi::F32 ? run_as<float>(threads, x, slots.typed_data(), a, A, b, *y)
                                      : run_as<BFloat16>(threads, x, slots.typed_data(), a, A, b, *y);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sgl_jax_adapters, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("slots")
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Any>()
                                  .RemainingArgs()
                                  .Ret<Any>());
