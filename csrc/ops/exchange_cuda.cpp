// SPDX-License-Identifier: Apache-2.0
// The gradient exchange on CUDA, on torch's current stream: a launch for each gradient, or one.
#include "../cuda/exchange_cuda.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "exchange.h"

namespace csgd {
namespace {

void encode_on_cuda(DType dtype, const std::vector<EncodeCall>& calls, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  for (const EncodeCall& call : calls) {
    C10_CUDA_CHECK(launch_encode_cuda(dtype, call, c10::cuda::getCurrentCUDAStream()));
  }
}

void pack_on_cuda(const PackCall& call, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch_pack_cuda(call, c10::cuda::getCurrentCUDAStream()));
}

void add_on_cuda(const AddCall& call, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch_add_cuda(call, c10::cuda::getCurrentCUDAStream()));
}

void decode_on_cuda(DType dtype, const std::vector<DecodeCall>& calls, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  for (const DecodeCall& call : calls) {
    C10_CUDA_CHECK(launch_decode_cuda(dtype, call, c10::cuda::getCurrentCUDAStream()));
  }
}

}  // namespace

const ExchangeDevice kExchangeCuda = {encode_on_cuda, pack_on_cuda, add_on_cuda, decode_on_cuda};

TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) { add_exchange<kExchangeCuda>(m); }

}  // namespace csgd
