// Encoded tensor maps, cached on the host.
#pragma once

#include <cuda.h>

#include "tensor_map.h"

namespace fused_resnet::hopper {

using TensorMap = CUtensorMap;

// The map of the memory at `address`, from a cache by address and numbers. Throws std::runtime_error where it breaks a
// limit or the driver refuses it. No link against libcuda: the encoders are asked of the runtime.
TensorMap encode(const TensorMapSpec& spec, const void* address);

}  // namespace fused_resnet::hopper
