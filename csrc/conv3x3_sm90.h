// Launcher of the 3x3 convolution for Hopper, for bindings.cpp; pointers are device pointers.
#pragma once

#include <cuda_runtime.h>

#include "bn_math.h"
#include "conv3x3_tile.h"

namespace fused_resnet {

struct Conv3x3Launch {
  Conv3x3Shape shape;
  DataType dtype;  // float16 or bfloat16
  Epilogue epilogue;
  const void* x;           // [images, height, width, channels]
  const void* w;           // [filters, 3, 3, channels]
  FrozenBatchNorm frozen;  // kAffine: of the output; mean null: out = acc + side
  const float* bn;         // kReluGradient: [5, filters] of `side`
  const void* side;        // [pixels, filters] or null
  const uint8_t* mask;     // [pixels, filters / 8], the values of `side` that count, or null: all
  void* out;               // [pixels, filters]
  float* partials;         // [partial_rows, 3 or 2, filters] or null
  int partial_rows;
  bool relu;
};

// Throws std::runtime_error where a tensor map cannot be made.
void launch_conv3x3_sm90(const Conv3x3Launch& launch, cudaStream_t stream);

}  // namespace fused_resnet
