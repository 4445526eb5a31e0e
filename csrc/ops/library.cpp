// SPDX-License-Identifier: Apache-2.0
// The schemas of torch.ops.csgd_cuda. "(a!)" marks what an operator changes in place.
#include <torch/library.h>

#include "calibrate_grad.h"
#include "csgd.h"
#include "exchange.h"
#include "hard_threshold.h"

TORCH_LIBRARY(csgd_cuda, m) {
  using csgd::CsgdArgs, csgd::schema;
  m.def(schema<CsgdArgs>("csgd_", "()").c_str(), {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
  // The checks of csgd_ alone: callers with several calls to make can check them all before the first.
  m.def(schema<CsgdArgs>("check_csgd", "()", /*mutates=*/false).c_str(), {at::Tag::pt2_compliant_tag});
  // csgd_cuda.calibrate_grad documents it.
  m.def(
      "calibrate_grad(Tensor grad, Tensor index, Tensor(a!) step, Tensor(b!)? lipschitz_bound, Tensor(c!)? tally, *, "
      "int channel_dim, float calibration, float? lipschitz, float bound_decay, str rounding, int seed, int rank) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
  // csgd_cuda.hard_threshold_ documents it.
  m.def(
      "hard_threshold_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor(c!)[] masks, int[]? keeps, *, "
      "str structure, bool across, Tensor? found_inf) -> ()",
      {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
  // csgd_cuda/distributed/coding.py documents these.
  m.def(
      "encode_codes(Tensor[] grads, Tensor bounds, int[] indices, *, int seed, int step, bool antithetic=False) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("pack_codes(Tensor codes, int rows) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("add_codes(Tensor words) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("decode_sums(Tensor words, Tensor units, Tensor(a!)[] grads) -> ()", {at::Tag::pt2_compliant_tag});
}

namespace csgd {

void run_nowhere(const PackedStep& step) {
  TORCH_CHECK(false, "csgd_ has no kernel for tensors on ", step.device(),
              " in this build; see csgd_cuda.show_config()");
}

// Sparse, complex and other tensors come here as well: the checks then name the one that is wrong.
TORCH_LIBRARY_IMPL(csgd_cuda, CompositeExplicitAutograd, m) {
  m.impl("csgd_", unboxed<CsgdArgs, csgd_<run_nowhere>>);
  m.impl("check_csgd", unboxed<CsgdArgs, csgd_<nullptr>>);
  m.impl("calibrate_grad", calibrate_grad<calibrate_grad_nowhere>);
  m.impl("hard_threshold_", hard_threshold_<hard_threshold_nowhere>);
  add_exchange<kExchangeNowhere>(m);
}

}  // namespace csgd
