// Launcher of the 3x3 convolution's weight gradient for Hopper, for bindings.cpp; pointers are device pointers.
#pragma once

#include <cuda_runtime.h>

#include "conv3x3_wgrad_tile.h"

namespace fused_resnet {

struct WgradLaunch {
  Conv3x3Shape shape;
  DataType dtype;  // float16 or bfloat16
  const void* x;   // [images, height, width, channels]
  const void* g;   // [pixels, filters]
  float* parts;    // [part_count, filters, 3, 3, channels]; dw itself where part_count is 1
  float* dw;       // [filters, 3, 3, channels]
  int part_count;
};

// Throws std::runtime_error where a tensor map cannot be made.
void launch_conv3x3_wgrad_sm90(const WgradLaunch& launch, cudaStream_t stream);

}  // namespace fused_resnet
