#include <cuda_runtime.h>

#include "conv3x3_sm90.h"
#include "hopper/ptx.cuh"
// The kernel needs the machine above.
#include "conv3x3_halo_sm90.cuh"
#include "conv3x3_sm90.cuh"

namespace fused_resnet {
namespace {

using hopper::TensorMap;

template <DataType type, int kBlockN, Epilogue kEpilogue>
__global__ void __launch_bounds__(hopper::kThreads, 1)
    conv3x3_sm90_kernel(const Conv3x3Arguments arguments, const __grid_constant__ TensorMap x,
                        const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap out,
                        const __grid_constant__ TensorMap side) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Conv3x3Block<type, kBlockN, kEpilogue>(arguments, x, w, out, side).run();
#endif
}

template <DataType type, Epilogue kEpilogue>
__global__ void __launch_bounds__(hopper::kThreads, 1)
    conv3x3_halo_sm90_kernel(const Conv3x3Arguments arguments, const __grid_constant__ TensorMap x,
                             const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap out,
                             const __grid_constant__ TensorMap side) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Conv3x3HaloBlock<type, kEpilogue>(arguments, x, w, out, side).run();
#endif
}

// Runs a kernel on at most `sms` blocks of its `items`.
template <typename Kernel>
void launch_kernel(Kernel kernel, const Conv3x3Launch& l, const Conv3x3Maps& maps, int items, int sms, int bytes,
                   cudaStream_t stream) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const TensorMap out = hopper::encode(maps.out, l.out);
  const TensorMap side = l.side == nullptr ? out : hopper::encode(maps.out, l.side);
  const Conv3x3Arguments arguments{l.shape,    l.partial_rows,    l.frozen, l.bn,
                                   l.partials, l.side != nullptr, l.mask,   l.relu};
  const int grid = items < sms ? items : sms;
  kernel<<<grid, hopper::kThreads, bytes, stream>>>(arguments, hopper::encode(maps.x, l.x), hopper::encode(maps.w, l.w),
                                                    out, side);
}

template <DataType type, Epilogue kEpilogue>
void launch_halo(const Conv3x3Launch& l, int sms, cudaStream_t stream) {
  launch_kernel(conv3x3_halo_sm90_kernel<type, kEpilogue>, l, halo_maps(l.shape, type == DataType::kBFloat16),
                halo_work(l.shape, l.partial_rows).items(), sms, HaloMemory<kEpilogue>::kBytes, stream);
}

template <DataType type, int kBlockN, Epilogue kEpilogue>
void launch_tile(const Conv3x3Launch& l, int sms, cudaStream_t stream) {
  launch_kernel(
      conv3x3_sm90_kernel<type, kBlockN, kEpilogue>, l, conv3x3_maps(l.shape, type == DataType::kBFloat16, kBlockN),
      conv3x3_work(l.shape, kBlockN, l.partial_rows).items(), sms, Conv3x3Memory<kBlockN, kEpilogue>::kBytes, stream);
}

template <DataType type>
void launch_type(const Conv3x3Launch& l, cudaStream_t stream) {
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const bool halo = conv3x3_reads_halos(l.shape);
  const int block_n = conv3x3_block_n(l.shape, l.epilogue, l.side != nullptr, l.partial_rows, sms);
  switch (l.epilogue) {
    case Epilogue::kStatistics:
      return halo            ? launch_halo<type, Epilogue::kStatistics>(l, sms, stream)
             : block_n == 64 ? launch_tile<type, 64, Epilogue::kStatistics>(l, sms, stream)
                             : launch_tile<type, 128, Epilogue::kStatistics>(l, sms, stream);
    case Epilogue::kReluGradient:
      return halo            ? launch_halo<type, Epilogue::kReluGradient>(l, sms, stream)
             : block_n == 64 ? launch_tile<type, 64, Epilogue::kReluGradient>(l, sms, stream)
                             : launch_tile<type, 128, Epilogue::kReluGradient>(l, sms, stream);
    case Epilogue::kAffine:
      return halo             ? launch_halo<type, Epilogue::kAffine>(l, sms, stream)
             : block_n == 64  ? launch_tile<type, 64, Epilogue::kAffine>(l, sms, stream)
             : block_n == 128 ? launch_tile<type, 128, Epilogue::kAffine>(l, sms, stream)
                              : launch_tile<type, 256, Epilogue::kAffine>(l, sms, stream);
  }
}

}  // namespace

void launch_conv3x3_sm90(const Conv3x3Launch& l, cudaStream_t stream) {
  if (l.shape.pixels() == 0) {
    const size_t width = (l.epilogue == Epilogue::kStatistics ? 3 : 2) * static_cast<size_t>(l.shape.filters);
    if (l.partials != nullptr) cudaMemsetAsync(l.partials, 0, l.partial_rows * width * sizeof(float), stream);
    return;
  }
  return l.dtype == DataType::kBFloat16 ? launch_type<DataType::kBFloat16>(l, stream)
                                        : launch_type<DataType::kFloat16>(l, stream);
}

}  // namespace fused_resnet
