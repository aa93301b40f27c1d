#include <cuda_runtime.h>

#include "bottleneck_sm90.h"
#include "hopper/ptx.cuh"
// The kernel needs the machine above.
#include "bottleneck_sm90.cuh"

namespace fused_resnet {
namespace {

using hopper::TensorMap;

template <DataType type, bool kProjection>
__global__ void __launch_bounds__(hopper::kThreads, 1)
    bottleneck_sm90_kernel(const BottleneckArguments arguments, const __grid_constant__ TensorMap x,
                           const __grid_constant__ TensorMap w1, const __grid_constant__ TensorMap w2,
                           const __grid_constant__ TensorMap w3, const __grid_constant__ TensorMap w_shortcut,
                           const __grid_constant__ TensorMap out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  BottleneckBlock<type, kProjection>(arguments, x, w1, w2, w3, w_shortcut, out).run();
#endif
}

template <DataType type, bool kProjection>
void launch_kind(const BottleneckLaunch& l, cudaStream_t stream) {
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const auto kernel = bottleneck_sm90_kernel<type, kProjection>;
  constexpr int kBytes = BottleneckMemory<kProjection>::kBytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const BottleneckMaps maps = bottleneck_maps(l.shape, type == DataType::kBFloat16, kProjection);
  const TensorMap w3 = hopper::encode(maps.w3, l.w3);
  const TensorMap w_shortcut = kProjection ? hopper::encode(maps.w3, l.w_shortcut) : w3;
  const BottleneckArguments arguments{l.shape, l.bn1, l.bn2, l.bn3, l.bn_shortcut};
  const int wanted = (l.shape.count() + 1) / 2;  // a tile for each warpgroup
  const int grid = wanted < sms ? wanted : sms;
  kernel<<<grid, hopper::kThreads, kBytes, stream>>>(arguments, hopper::encode(maps.x, l.x),
                                                     hopper::encode(maps.w1, l.w1), hopper::encode(maps.w2, l.w2), w3,
                                                     w_shortcut, hopper::encode(maps.out, l.out));
}

template <DataType type>
void launch_type(const BottleneckLaunch& l, cudaStream_t stream) {
  return l.w_shortcut == nullptr ? launch_kind<type, false>(l, stream) : launch_kind<type, true>(l, stream);
}

}  // namespace

void launch_bottleneck_sm90(const BottleneckLaunch& l, cudaStream_t stream) {
  if (l.shape.count() == 0) return;
  return l.dtype == DataType::kBFloat16 ? launch_type<DataType::kBFloat16>(l, stream)
                                        : launch_type<DataType::kFloat16>(l, stream);
}

}  // namespace fused_resnet
