// SPDX-License-Identifier: Apache-2.0
// The operators of the gradient exchange on torch's side: encode_codes, pack_codes, add_codes, decode_sums. Their
// arguments are checked and packed into the plain structs of csrc/core; each device adds what runs these.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../core/exchange.h"

namespace csgd {

// What runs the packed calls on one device.
struct ExchangeDevice {
  void (*encode)(DType, const std::vector<EncodeCall>&, c10::Device);
  void (*pack)(const PackCall&, c10::Device);
  void (*add)(const AddCall&, c10::Device);
  void (*decode)(DType, const std::vector<DecodeCall>&, c10::Device);
};

extern const ExchangeDevice kExchangeCpu, kExchangeCuda, kExchangeNowhere;

// Checks, packs, runs. csgd_cuda/distributed/coding.py documents them.
at::Tensor run_encode_codes(at::TensorList grads, const at::Tensor& bounds, at::IntArrayRef indices, int64_t seed,
                            int64_t step, bool antithetic, const ExchangeDevice& device);
at::Tensor run_pack_codes(const at::Tensor& codes, int64_t rows, const ExchangeDevice& device);
at::Tensor run_add_codes(const at::Tensor& words, const ExchangeDevice& device);
void run_decode_sums(const at::Tensor& words, const at::Tensor& units, at::TensorList grads,
                     const ExchangeDevice& device);

// The kernels of the operators for one device.
template <const ExchangeDevice& device>
at::Tensor encode_codes(at::TensorList grads, const at::Tensor& bounds, at::IntArrayRef indices, int64_t seed,
                        int64_t step, bool antithetic) {
  return run_encode_codes(grads, bounds, indices, seed, step, antithetic, device);
}

template <const ExchangeDevice& device>
at::Tensor pack_codes(const at::Tensor& codes, int64_t rows) {
  return run_pack_codes(codes, rows, device);
}

template <const ExchangeDevice& device>
at::Tensor add_codes(const at::Tensor& words) {
  return run_add_codes(words, device);
}

template <const ExchangeDevice& device>
void decode_sums(const at::Tensor& words, const at::Tensor& units, at::TensorList grads) {
  run_decode_sums(words, units, grads, device);
}

// Makes them those of a dispatch key.
template <const ExchangeDevice& device, class Library>
void add_exchange(Library& m) {
  m.impl("encode_codes", encode_codes<device>);
  m.impl("pack_codes", pack_codes<device>);
  m.impl("add_codes", add_codes<device>);
  m.impl("decode_sums", decode_sums<device>);
}

}  // namespace csgd
