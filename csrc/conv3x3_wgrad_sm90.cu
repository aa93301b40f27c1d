#include <cuda_runtime.h>

#include "conv3x3_wgrad_sm90.h"
#include "hopper/ptx.cuh"
// The kernel needs the machine above.
#include "conv3x3_wgrad_sm90.cuh"

namespace fused_resnet {
namespace {

using hopper::TensorMap;

template <DataType type, int kFilters>
__global__ void __launch_bounds__(hopper::kThreads, 1)
    conv3x3_wgrad_sm90_kernel(const WgradArguments arguments, const __grid_constant__ TensorMap x,
                              const __grid_constant__ TensorMap g) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  WgradBlock<type, kFilters>(arguments, x, g).run();
#endif
}

// dw [elements] = the sum of parts [count, elements], in order; elements in fours.
__global__ void __launch_bounds__(256) wgrad_reduce_kernel(const float4* parts, float4* dw, int count, int64_t fours) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= fours) return;
  float4 sum = parts[i];
  for (int part = 1; part < count; ++part) {
    const float4 next = parts[part * fours + i];
    sum.x += next.x;
    sum.y += next.y;
    sum.z += next.z;
    sum.w += next.w;
  }
  dw[i] = sum;
}

template <DataType type, int kFilters>
void launch_tile(const WgradLaunch& l, cudaStream_t stream) {
  const auto kernel = conv3x3_wgrad_sm90_kernel<type, kFilters>;
  constexpr int kBytes = WgradMemory<kFilters>::kBytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const WgradMaps maps = wgrad_maps(l.shape, type == DataType::kBFloat16);
  const WgradArguments arguments{l.shape, l.part_count, l.parts};
  const int items = wgrad_work(l.shape, l.part_count).items();
  kernel<<<items, hopper::kThreads, kBytes, stream>>>(arguments, hopper::encode(maps.x, l.x),
                                                      hopper::encode(maps.g, l.g));
}

template <DataType type>
void launch_type(const WgradLaunch& l, cudaStream_t stream) {
  switch (wgrad_filters(l.shape.filters)) {
    case 256:
      return launch_tile<type, 256>(l, stream);
    case 128:
      return launch_tile<type, 128>(l, stream);
    default:
      return launch_tile<type, 64>(l, stream);
  }
}

}  // namespace

void launch_conv3x3_wgrad_sm90(const WgradLaunch& l, cudaStream_t stream) {
  const int64_t elements = static_cast<int64_t>(l.shape.filters) * 9 * l.shape.channels;
  if (l.shape.pixels() == 0) {
    cudaMemsetAsync(l.dw, 0, elements * sizeof(float), stream);
    return;
  }
  l.dtype == DataType::kBFloat16 ? launch_type<DataType::kBFloat16>(l, stream)
                                 : launch_type<DataType::kFloat16>(l, stream);
  if (l.part_count == 1) return;
  constexpr int kThreads = 256;
  const int64_t fours = elements / 4;
  wgrad_reduce_kernel<<<static_cast<unsigned>((fours + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      reinterpret_cast<const float4*>(l.parts), reinterpret_cast<float4*>(l.dw), l.part_count, fours);
}

}  // namespace fused_resnet
