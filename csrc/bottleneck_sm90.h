// Launcher of the bottleneck for Hopper, for bindings.cpp; pointers are device pointers.
#pragma once

#include <cuda_runtime.h>

#include "bn_math.h"
#include "bottleneck_tile.h"

namespace fused_resnet {

struct BottleneckLaunch {
  SquareTiles shape;
  DataType dtype;          // float16 or bfloat16
  const void* x;           // [images, height, width, 256], or 64 with a projection
  const void* w1;          // [64, 256 or 64]
  const void* w2;          // [64, 3, 3, 64]
  const void* w3;          // [256, 64]
  const void* w_shortcut;  // [256, 64], or null: the shortcut is x
  FrozenBatchNorm bn1, bn2, bn3, bn_shortcut;
  void* out;  // [images, height, width, 256]
};

// Throws std::runtime_error where a tensor map cannot be made.
void launch_bottleneck_sm90(const BottleneckLaunch& launch, cudaStream_t stream);

}  // namespace fused_resnet
