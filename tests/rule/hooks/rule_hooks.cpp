// SPDX-License-Identifier: Apache-2.0
// A Python module for tests: the compiled rule on one element on the host, with draws that the caller gives, and parts
// of the rule on a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/core/sgd.h"
#include "shortcuts.h"

#if CSGD_WITH_CUDA
#include "rule_hooks_cuda.h"
#endif

namespace py = pybind11;

namespace csgd {
namespace {

using Words = std::array<uint32_t, 4>;

Words to_words(const Philox4x32& bits) { return {bits.word[0], bits.word[1], bits.word[2], bits.word[3]}; }

Philox4x32 to_philox(const Words& w) { return {{w[0], w[1], w[2], w[3]}}; }

uint64_t to_key(const std::array<uint32_t, 2>& words) { return words[0] | uint64_t{words[1]} << 32; }

Words philox(const Words& counter, const std::array<uint32_t, 2>& key) {
  return to_words(philox4x32_10(to_philox(counter), to_key(key)));
}

#if CSGD_WITH_CUDA
Words philox_cuda(const Words& counter, const std::array<uint32_t, 2>& key) {
  Philox4x32 bits;
  const cudaError_t error = philox4x32_10_on_gpu(to_philox(counter), to_key(key), &bits);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return to_words(bits);
}
#endif

Shortcut shortcut_named(const std::string& name) {
  if (name == "inverse_probability") return Shortcut::kInverseProbability;
  if (name == "round_up") return Shortcut::kRoundUp;
  if (name == "limited_product") return Shortcut::kLimitedProduct;
  if (name == "widen_float16") return Shortcut::kWidenFloat16;
  if (name == "truncate_float16") return Shortcut::kTruncateFloat16;
  if (name == "least_product") return Shortcut::kLeastProduct;
  if (name == "larger_or_nan") return Shortcut::kLargerOrNan;
  throw std::invalid_argument("no shortcut is named " + name);
}

std::vector<float> take_shortcuts(const std::string& name, std::vector<float> values) {
  const Shortcut shortcut = shortcut_named(name);
  for (float& value : values) value = take_shortcut(shortcut, value);
  return values;
}

#if CSGD_WITH_CUDA
std::vector<float> take_shortcuts_cuda(const std::string& name, std::vector<float> values) {
  const auto count = static_cast<int64_t>(values.size());
  const cudaError_t error = take_shortcuts_on_gpu(shortcut_named(name), values.data(), count);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return values;
}
#endif

uint32_t draw(uint64_t seed, uint32_t stream, int64_t position, uint32_t index, int64_t step) {
  const auto bits = draw_block(seed, static_cast<Stream>(stream), static_cast<uint64_t>(position) / kDrawsPerCall,
                               index, static_cast<uint32_t>(step));
  return draw_lane(bits, static_cast<int>(position % kDrawsPerCall));
}

DType dtype_named(const std::string& dtype) {
  if (dtype == "float32") return DType::kFloat32;
  if (dtype == "float64") return DType::kFloat64;
  if (dtype == "bfloat16") return DType::kBFloat16;
  if (dtype == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " + dtype);
}

template <class S>
S rounded(typename Storage<S>::Opmath value, std::optional<uint32_t> draw) {
  return draw ? Storage<S>::store_stochastic(value, *draw) : Storage<S>::store_nearest(value);
}

// The numbers that are stored for `value` with each of the draws (None: nearest even).
std::vector<double> store(const std::string& dtype, double value, const std::vector<std::optional<uint32_t>>& draws) {
  return with_storage(dtype_named(dtype), [&](auto tag) {
    using S = decltype(tag);
    std::vector<double> out;
    for (const auto& d : draws) {
      const S stored = rounded<S>(static_cast<typename Storage<S>::Opmath>(value), d);
      out.push_back(static_cast<double>(Storage<S>::load(stored)));
    }
    return out;
  });
}

struct ElementResult {
  double n;                    // draws out of 2^16 that move the element
  double momentum_buffer;      // as stored
  std::vector<double> params;  // as stored, one for each calibration draw
};

ElementResult update_element(const std::string& dtype, double param, double grad, double momentum_buffer, int64_t step,
                             double lipschitz_bound, double lr, double momentum, double dampening, double weight_decay,
                             bool nesterov, bool maximize, double calibration, std::optional<float> grad_scale,
                             const std::vector<uint32_t>& draws, std::optional<uint32_t> param_draw,
                             std::optional<uint32_t> momentum_draw) {
  return with_storage(dtype_named(dtype), [&](auto tag) {
    using S = decltype(tag);
    using T = typename Storage<S>::Opmath;
    const auto in_memory = [](double x) { return Storage<S>::load(Storage<S>::store_nearest(static_cast<T>(x))); };
    SgdOptions options{};
    options.lr = lr;
    options.momentum = momentum;
    options.one_minus_dampening = 1.0 - dampening;
    options.weight_decay = weight_decay;
    options.calibration = calibration;
    options.grad_scale = grad_scale ? &*grad_scale : nullptr;
    options.nesterov = nesterov;
    options.maximize = maximize;
    T bound = static_cast<T>(lipschitz_bound);
    StepTensor tensor{};
    tensor.step = &step;
    tensor.bound = &bound;
    const auto numbers = Sgd::option_scalars<T>(options);
    const auto s = step_scalars<T>(options, numbers, tensor);
    const Sgd::AnyDirection<T> direction(options, numbers, Sgd::tensor_scalars<T>(options, step));
    const T theta = in_memory(param);
    T buffers[1] = {in_memory(momentum_buffer)};
    const T d = direction(in_memory(grad) * s.grad_factor, theta, buffers);
    const T n = moving_draws(d, s.scale);
    const S stored_m = rounded<S>(buffers[0], momentum_draw);
    const S stored_theta = rounded<S>(theta - change_of(s.lr, d * inverse_probability(n)), param_draw);
    const double moved = static_cast<double>(Storage<S>::load(stored_theta));
    ElementResult result{static_cast<double>(n), static_cast<double>(Storage<S>::load(stored_m)), {}};
    for (const uint32_t r : draws) result.params.push_back(moves(r, n) ? moved : static_cast<double>(theta));
    return result;
  });
}

PYBIND11_MODULE(rule_hooks, m) {
  m.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"), "One Philox call on the host: four words.");
#if CSGD_WITH_CUDA
  m.def("philox4x32_10_cuda", &philox_cuda, py::arg("counter"), py::arg("key"), "One Philox call on the GPU.");
  m.def("take_shortcuts_cuda", &take_shortcuts_cuda, py::arg("name"), py::arg("values"),
        "take_shortcuts as the GPU computes it.");
#endif
  m.def("take_shortcuts", &take_shortcuts, py::arg("name"), py::arg("values"),
        "A part of the rule, named as in shortcuts.h, for each value.");
  m.def("draw", &draw, py::arg("seed"), py::arg("stream"), py::arg("position"), py::arg("index"), py::arg("step"),
        "The 16-bit draw of one element.");
  m.def("refine_reciprocal", &refine_reciprocal, py::arg("n"), py::arg("estimate"), "1 / n, as a GPU finds it.");
  m.def("store", &store, py::arg("dtype"), py::arg("value"), py::arg("draws"),
        "value as stored in dtype, for each draw of the stochastic rounding (None: nearest even).");
  py::class_<ElementResult>(m, "ElementResult")
      .def_readonly("n", &ElementResult::n)
      .def_readonly("momentum_buffer", &ElementResult::momentum_buffer)
      .def_readonly("params", &ElementResult::params);
  m.def("update_element", &update_element, py::arg("dtype"), py::arg("param"), py::arg("grad"), py::kw_only(),
        py::arg("momentum_buffer") = 0.0, py::arg("step") = 1, py::arg("lipschitz_bound") = 0.0, py::arg("lr") = 1.0,
        py::arg("momentum") = 0.0, py::arg("dampening") = 0.0, py::arg("weight_decay") = 0.0,
        py::arg("nesterov") = false, py::arg("maximize") = false, py::arg("calibration") = 1.0,
        py::arg("grad_scale") = py::none(), py::arg("draws") = std::vector<uint32_t>{},
        py::arg("param_draw") = py::none(), py::arg("momentum_draw") = py::none(),
        "One element of the rule, for each of the calibration draws given.");
}

}  // namespace
}  // namespace csgd
