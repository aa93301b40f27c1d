// Launchers of the BatchNorm kernels, for bindings.cpp; pointers are device pointers, null where optional and absent.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bn_math.h"
#include "data_type.h"

namespace fused_resnet {

struct FinalizeArguments {
  const float* partials;  // [rows, 3, channels]: count, mean, M2
  const float* gamma;     // [channels] or null: 1
  const float* beta;      // [channels] or null: 0
  float* running_mean;    // [channels] or null: not tracked
  float* running_var;
  int64_t* num_batches_tracked;  // or null
  float* bn;                     // [5, channels]: mean, rstd, scale, shift, 1 / count
  int64_t rows;
  int64_t channels;
  double momentum;
  double eps;
  bool cumulative;  // momentum is 1 / (batches counted so far, this one included)
};

void launch_bn_finalize(const FinalizeArguments& arguments, cudaStream_t stream);

struct FrozenArguments {
  FrozenBatchNorm running;
  float* bn;  // [5, channels], the last row 0: constants in backward
  int64_t channels;
};

void launch_bn_frozen(const FrozenArguments& arguments, cudaStream_t stream);

struct JoinArguments {
  const void* c;             // [pixels, channels]
  const float* bn;           // [5, channels]
  const void* shortcut;      // [pixels, channels]
  const float* bn_shortcut;  // [5, channels] or null: the shortcut itself is added
  void* out;                 // [pixels, channels]
  uint8_t* mask;             // [pixels, ceil(channels / 8)]
  int64_t pixels;
  int64_t channels;
  DataType dtype;
};

void launch_bn_join(const JoinArguments& arguments, cudaStream_t stream);

}  // namespace fused_resnet
