#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "tensor_map.cuh"

namespace fused_resnet::hopper {
namespace {

template <typename Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }
  return reinterpret_cast<Function>(function);
}

// Drivers up to 13.1 mark maps of tensors below 128 KiB wrongly; CUTLASS clears that bit, and so do we
// (cute/atom/copy_traits_sm90_tma.hpp).
void repair_small_map(const TensorMapSpec& spec, TensorMap& map) {
  static const int driver = [] {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
  }();
  if (driver > 13010 || spec.stride_bytes(spec.rank - 1) >= 131072) return;
  uint64_t words[sizeof(TensorMap) / sizeof(uint64_t)];
  std::memcpy(words, &map, sizeof(map));
  words[1] &= ~(uint64_t{1} << 21);
  std::memcpy(&map, words, sizeof(map));
}

TensorMap encode_new(const TensorMapSpec& spec, void* address) {
  static const auto tiled = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto im2col = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const auto type = spec.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint32_t rank = static_cast<cuuint32_t>(spec.rank);
  cuuint64_t extent[4], strides[3];
  for (int i = 0; i < 4; ++i) extent[i] = spec.extent[i];
  for (int i = 0; i + 1 < spec.rank; ++i) strides[i] = spec.stride_bytes(i);
  const cuuint32_t steps[4] = {1, spec.step, spec.step, 1};
  const int lower[2] = {spec.lower, spec.lower}, upper[2] = {spec.upper, spec.upper};
  TensorMap map;
  const CUresult result =
      spec.im2col
          ? im2col(&map, type, rank, address, extent, strides, lower, upper, spec.channels, spec.pixels, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
          : tiled(&map, type, rank, address, extent, strides, spec.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("the CUDA driver refused a tensor map (error " + std::to_string(result) + ")");
  }
  repair_small_map(spec, map);
  return map;
}

}  // namespace

TensorMap encode(const TensorMapSpec& spec, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    throw std::runtime_error("tensor map: the address is no multiple of 16 bytes");
  }
  if (const char* reason = fault(spec)) throw std::runtime_error(std::string("tensor map: ") + reason);
  std::string key;
  const auto append = [&key](const auto& value) { key.append(reinterpret_cast<const char*>(&value), sizeof(value)); };
  append(address);
  for (int i = 0; i < 4; ++i) append(spec.extent[i]), append(spec.box[i]);
  append(spec.im2col), append(spec.bfloat16), append(spec.rank), append(spec.lower), append(spec.upper);
  append(spec.channels), append(spec.pixels), append(spec.step);
  static std::mutex mutex;
  static std::map<std::string, TensorMap> cache;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find(key);
  if (found != cache.end()) return found->second;
  constexpr size_t kMaxEntries = 4096;  // addresses come and go: forget them all rather than grow without end
  if (cache.size() >= kMaxEntries) cache.clear();
  return cache[key] = encode_new(spec, const_cast<void*>(address));
}

}  // namespace fused_resnet::hopper
