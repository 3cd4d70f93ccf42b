// Products of tokens with a matrix of their dtype on CPUs, as one call of XLA's foreign-function interface.

#include "matrix.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using Bools = ffi::Buffer<ffi::PRED>;

template <typename Element>
ffi::Error multiply(ffi::ThreadPool& threads, const Any& x, const Any& w, const Bools& live, const Output& out) {
  const Tokens tokens(live.typed_data(), x.dimensions()[0], out);
  const auto as_it_is = [](float sum, int64_t, int64_t) { return sum; };
  const Product<UnitOf<Element>, Element, Element, decltype(as_it_is)> product{
      static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(w.untyped_data()), out,
      tokens.at.data(), tokens.number, x.dimensions()[1], out.O, as_it_is};
  product.share_rows(threads);
  return ffi::Error::Success();
}

ffi::Error run(ffi::ThreadPool threads, Any x, Any w, Bools live, ffi::Result<Any> result) {
  const Output out{result->untyped_data(), result->element_type() == ffi::F32, w.dimensions()[0]};
  const bool is_float = x.element_type() == ffi::F32;
  return is_float ? multiply<float>(threads, x, w, live, out) : multiply<BFloat16>(threads, x, w, live, out);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sgl_jax_dense, run,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Bools>().Ret<Any>());
