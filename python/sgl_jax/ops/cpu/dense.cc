// Products of tokens with a matrix of their dtype on CPUs, as one call of XLA's foreign-function interface.

#include "matrix.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;

template <typename Element>
ffi::Error multiply(ffi::ThreadPool& threads, const Any& x, const Any& w, Output out) {
  const int64_t T = x.dimensions()[0], I = x.dimensions()[1], O = w.dimensions()[0];
  const auto as_it_is = [](float sum, int64_t, int64_t) { return sum; };
  const Product<UnitOf<Element>, Element, Element, decltype(as_it_is)> product{
      static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(w.untyped_data()), out, T, I, O, as_it_is};
  product.share_rows(threads);
  return ffi::Error::Success();
}

ffi::Error run(ffi::ThreadPool threads, Any x, Any w, ffi::Result<Any> result) {
  const Output out{result->untyped_data(), result->element_type() == ffi::F32};
  return x.element_type() == ffi::F32 ? multiply<float>(threads, x, w, out) : multiply<BFloat16>(threads, x, w, out);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sgl_jax_dense, run,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Ret<Any>());
