// SPDX-License-Identifier: Apache-2.0
// The launchers of the kernels that write rows of sums as planes of bits, and read them.
// csgd_cuda/distributed/planes.py describes the planes. They take plain structs and CUDA runtime types, and do not need
// torch. They do not wait for the GPU. There must be at least one row, and one word in it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace csgd {

// Rows of sums, packed into words as PackCall describes. A row takes 4 * words bytes at most: as words, or as planes
// where these take fewer.
struct PlaneRows {
  int64_t rows;
  int64_t words;   // of a row
  uint32_t radix;  // 2 * most + 1
  uint32_t most;   // a sum is one of -most ... most, stored plus `most`
  int places;      // sums of a word
};

struct WritePlanesCall {
  PlaneRows of;
  const uint32_t* words;
  uint8_t* bytes;    // out: 4 * words of each row; zeros before
  int64_t* lengths;  // out: how many of them a row takes
  int64_t* counts;   // scratch: plane_counts(of) numbers
};

struct ReadPlanesCall {
  PlaneRows of;
  const uint8_t* bytes;   // the rows, one after another
  const int64_t* begins;  // of the rows among the bytes, and the end of the last one
  uint32_t* words;        // out
  bool* broken;           // out: for each row whether it has not the bytes that its planes take; its words are not set
  int64_t* tables;        // scratch: plane_tables(of) numbers
  int64_t* ranks;         // scratch: plane_ranks(of) numbers
};

int64_t plane_counts(const PlaneRows& of);
int64_t plane_tables(const PlaneRows& of);
int64_t plane_ranks(const PlaneRows& of);

cudaError_t launch_write_planes_cuda(WritePlanesCall call, cudaStream_t stream);
cudaError_t launch_read_planes_cuda(ReadPlanesCall call, cudaStream_t stream);

}  // namespace csgd
