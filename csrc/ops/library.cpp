// SPDX-License-Identifier: Apache-2.0
// The schemas of torch.ops.csgd_cuda. "(a!)" marks what an operator changes in place.
#include <torch/library.h>

#include <string>

#include "calibrate_grad.h"
#include "csgd.h"
#include "exchange.h"
#include "hard_threshold.h"

namespace {

// Both operators take the same arguments; csgd_cuda.functional.csgd_ documents them.
std::string schema(const char* name, bool mutates) {
  const auto changed = [&](const char* alias) { return std::string(mutates ? alias : ""); };
  return std::string(name) + "(Tensor" + changed("(a!)") + "[] params, Tensor[] grads, Tensor" + changed("(b!)") +
         "[] momentum_buffers, Tensor" + changed("(c!)") + "[] steps, Tensor" + changed("(d!)") +
         "[] lipschitz_bounds, int[] indices, int[] shards, *, float lr, float momentum, float dampening, float "
         "weight_decay, "
         "bool nesterov, float calibration, float? lipschitz, float bound_decay, str rounding, int seed, "
         "bool maximize, bool fresh_momentum, Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, Tensor" +
         changed("(e!)") + "? tallies) -> ()";
}

}  // namespace

TORCH_LIBRARY(csgd_cuda, m) {
  m.def(schema("csgd_", true).c_str(), {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
  // The checks of csgd_ alone: callers with several calls to make can check them all before the first.
  m.def(schema("check_csgd", false).c_str(), {at::Tag::pt2_compliant_tag});
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
  m.impl("csgd_", csgd_<run_nowhere>);
  m.impl("check_csgd", csgd_<nullptr>);
  m.impl("calibrate_grad", calibrate_grad<calibrate_grad_nowhere>);
  m.impl("hard_threshold_", hard_threshold_<hard_threshold_nowhere>);
  add_exchange<kExchangeNowhere>(m);
}

}  // namespace csgd
