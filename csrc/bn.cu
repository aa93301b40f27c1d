// BatchNorm kernels.
//
//   bn_finalize  partials [T, 3, C] -> bn [5, C] = (mean, rstd, scale, shift, 1 / n), running statistics in place
//                rstd = 1 / sqrt(M2 / n + eps), scale = gamma * rstd, shift = beta - mean * scale
//   bn_frozen    the same from running statistics, with 0 for 1 / n
//   bn_join      out = relu(c * scale + shift + s), s the shortcut or its own affine; mask = bits of out > 0
//
// Sums run in fp64 in a fixed order and there are no atomics: the same input gives the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bn.h"

namespace fused_resnet {
namespace {

constexpr int kChannelsPerBlock = 32;  // one 128-byte line of every row
constexpr int kRowLanes = 16;          // rows in flight; each lane merges every 16th row, then lanes merge as a tree

// The rows of a bn table, at one channel.
__device__ __forceinline__ void store_vectors(float* bn, int64_t channels, double mean, double rstd, double scale,
                                              double beta, double inv_count) {
  bn[0] = static_cast<float>(mean);
  bn[channels] = static_cast<float>(rstd);
  bn[2 * channels] = static_cast<float>(scale);
  bn[3 * channels] = static_cast<float>(beta - mean * scale);
  bn[4 * channels] = static_cast<float>(inv_count);
}

__global__ void __launch_bounds__(kChannelsPerBlock* kRowLanes) bn_finalize_kernel(FinalizeArguments a) {
  __shared__ Statistics lanes[kRowLanes][kChannelsPerBlock];
  const int lane = threadIdx.y;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannelsPerBlock + threadIdx.x;
  Statistics s{0.0, 0.0, 0.0};
  if (channel < a.channels) {
    for (int64_t row = lane; row < a.rows; row += kRowLanes) {
      const float* p = a.partials + row * 3 * a.channels + channel;
      s = merge(s, {p[0], p[a.channels], p[2 * a.channels]});
    }
  }
  lanes[lane][threadIdx.x] = s;
  for (int step = kRowLanes / 2; step > 0; step /= 2) {
    __syncthreads();
    if (lane < step) {
      lanes[lane][threadIdx.x] = merge(lanes[lane][threadIdx.x], lanes[lane + step][threadIdx.x]);
    }
  }
  if (lane != 0) return;
  if (channel < a.channels) {
    s = lanes[0][threadIdx.x];
    const double n = s.count > 0.0 ? s.count : 1.0;
    const double rstd = 1.0 / sqrt(s.m2 / n + a.eps);
    const double scale = a.gamma == nullptr ? rstd : a.gamma[channel] * rstd;
    const double beta = a.beta == nullptr ? 0.0 : a.beta[channel];
    store_vectors(a.bn + channel, a.channels, s.mean, rstd, scale, beta, 1.0 / n);
    if (a.running_mean != nullptr && s.count > 0.0) {
      const double weight = a.cumulative ? 1.0 / (*a.num_batches_tracked + 1) : a.momentum;
      a.running_mean[channel] = static_cast<float>(running(a.running_mean[channel], s.mean, weight));
      a.running_var[channel] = static_cast<float>(running(a.running_var[channel], unbiased_variance(s), weight));
    }
  }
}

// On its own: every block of the kernel above reads the counter in cumulative mode.
__global__ void count_batch_kernel(int64_t* num_batches_tracked) { *num_batches_tracked += 1; }

__global__ void __launch_bounds__(128) bn_frozen_kernel(FrozenArguments a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= a.channels) return;
  const FrozenBatchNorm& bn = a.running;
  const double rstd = 1.0 / sqrt(bn.var[channel] + bn.eps);
  const double scale = bn.gamma == nullptr ? rstd : bn.gamma[channel] * rstd;
  const double beta = bn.beta == nullptr ? 0.0 : bn.beta[channel];
  store_vectors(a.bn + channel, a.channels, bn.mean[channel], rstd, scale, beta, 0.0);
}

template <typename T>
struct alignas(sizeof(T) * 8) Eight {
  T values[8];
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

// Zero for negative values; a NaN stays a NaN, as in PyTorch.
__device__ __forceinline__ float relu(float v) { return v < 0.0f ? 0.0f : v; }

// One thread, one byte of the mask: eight channels of a pixel. kVector: they are one aligned access.
template <typename T, bool kVector, bool kAffineShortcut>
__global__ void __launch_bounds__(256) bn_join_kernel(JoinArguments a) {
  const int64_t bytes_per_pixel = (a.channels + 7) / 8;
  const int64_t total = a.pixels * bytes_per_pixel;
  const T* c = static_cast<const T*>(a.c);
  const T* shortcut = static_cast<const T*>(a.shortcut);
  T* out = static_cast<T*>(a.out);
  const float* scale = a.bn + 2 * a.channels;
  const float* shift = a.bn + 3 * a.channels;
  const float* side_scale = kAffineShortcut ? a.bn_shortcut + 2 * a.channels : nullptr;
  const float* side_shift = kAffineShortcut ? a.bn_shortcut + 3 * a.channels : nullptr;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t pixel = i / bytes_per_pixel;
    const int first = static_cast<int>(i - pixel * bytes_per_pixel) * 8;
    const int64_t offset = pixel * a.channels + first;
    const int valid = kVector ? 8 : min(8, static_cast<int>(a.channels) - first);
    Eight<T> main, side, result;
    if constexpr (kVector) {
      main = *reinterpret_cast<const Eight<T>*>(c + offset);
      side = *reinterpret_cast<const Eight<T>*>(shortcut + offset);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < valid) {
          main.values[j] = c[offset + j];
          side.values[j] = shortcut[offset + j];
        }
      }
    }
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < valid) {
        float s = to_float(side.values[j]);
        if constexpr (kAffineShortcut) s = fmaf(s, side_scale[first + j], side_shift[first + j]);
        const float y = relu(fmaf(to_float(main.values[j]), scale[first + j], shift[first + j]) + s);
        bits |= static_cast<uint32_t>(y > 0.0f) << j;
        store(&result.values[j], y);
      }
    }
    if constexpr (kVector) {
      *reinterpret_cast<Eight<T>*>(out + offset) = result;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < valid) out[offset + j] = result.values[j];
      }
    }
    a.mask[i] = static_cast<uint8_t>(bits);
  }
}

template <typename T>
void launch_join_of(const JoinArguments& a, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t total = a.pixels * ((a.channels + 7) / 8);
  if (total == 0) return;
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t wanted = (total + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Eight<T>) == 0; };
  const bool vector = a.channels % 8 == 0 && aligned(a.c) && aligned(a.shortcut) && aligned(a.out);
  const bool affine = a.bn_shortcut != nullptr;
  if (vector && affine) {
    bn_join_kernel<T, true, true><<<blocks, kThreads, 0, stream>>>(a);
  } else if (vector) {
    bn_join_kernel<T, true, false><<<blocks, kThreads, 0, stream>>>(a);
  } else if (affine) {
    bn_join_kernel<T, false, true><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    bn_join_kernel<T, false, false><<<blocks, kThreads, 0, stream>>>(a);
  }
}

}  // namespace

void launch_bn_finalize(const FinalizeArguments& a, cudaStream_t stream) {
  if (a.channels == 0) return;
  const unsigned blocks = static_cast<unsigned>((a.channels + kChannelsPerBlock - 1) / kChannelsPerBlock);
  bn_finalize_kernel<<<blocks, dim3(kChannelsPerBlock, kRowLanes), 0, stream>>>(a);
  if (a.num_batches_tracked != nullptr) count_batch_kernel<<<1, 1, 0, stream>>>(a.num_batches_tracked);
}

void launch_bn_frozen(const FrozenArguments& a, cudaStream_t stream) {
  if (a.channels == 0) return;
  constexpr int kThreads = 128;
  bn_frozen_kernel<<<static_cast<unsigned>((a.channels + kThreads - 1) / kThreads), kThreads, 0, stream>>>(a);
}

void launch_bn_join(const JoinArguments& a, cudaStream_t stream) {
  switch (a.dtype) {
    case DataType::kFloat32:
      return launch_join_of<float>(a, stream);
    case DataType::kFloat16:
      return launch_join_of<__half>(a, stream);
    case DataType::kBFloat16:
      return launch_join_of<__nv_bfloat16>(a, stream);
  }
}

}  // namespace fused_resnet
