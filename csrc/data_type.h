// The element types of the kernels, and the mark of functions that host and device share.
#pragma once

#ifdef __CUDACC__
#define FUSED_RESNET_HD __host__ __device__ __forceinline__
#else
#define FUSED_RESNET_HD inline
#endif

namespace fused_resnet {

enum class DataType { kFloat32, kFloat16, kBFloat16 };

}  // namespace fused_resnet
