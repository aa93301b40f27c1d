// How a bottleneck is cut into tiles, and where they lie in shared memory. Plain arithmetic.
#pragma once

#include <cstdint>

#include "hopper/layout.h"
#include "hopper/tensor_map.h"
#include "square_tile.h"

namespace fused_resnet {

constexpr int kWidth = 64;  // channels of the inner tensors
constexpr int kWide = 256;  // channels of x and out
// Shared memory, bytes from an aligned start. Of 227 KiB:
//
//   136 KiB  weights of the three convolutions, resident: 4 x [64, 64], 9 x [64, 64], [256, 64]
//    52 KiB  two slots for each warpgroup: 10 x 10 pixels of x, 64 channels (100 rows, 104 with alignment)
//     3 KiB  scale and shift of the three BatchNorms
//    32 KiB  for each warpgroup the first convolution's activation on the halo (100 rows), and in its place, when the
//            3x3 has read it, two buffers of 64 pixels x 64 channels of the result
//
// wgmma reads 128 rows of a slot: the 28 beyond the halo belong to the next slot, or to the vectors behind the last
// one, and only reach rows of the product that nobody uses.
struct BottleneckMemory {
  static constexpr uint32_t kBlock = 64 * hopper::kRowBytes;  // 64 rows
  static constexpr uint32_t kW1 = 0;
  static constexpr uint32_t kW2 = kW1 + 4 * kBlock;
  static constexpr uint32_t kW3 = kW2 + 9 * kBlock;
  static constexpr uint32_t kWeightBytes = 17 * kBlock;
  static constexpr uint32_t kSlots = kWeightBytes;  // [2 warpgroups, 2]
  static constexpr uint32_t kVectors = kSlots + 4 * kHaloSlot;
  static constexpr uint32_t kScale1 = kVectors, kShift1 = kScale1 + 4 * kWidth;
  static constexpr uint32_t kScale2 = kShift1 + 4 * kWidth, kShift2 = kScale2 + 4 * kWidth;
  static constexpr uint32_t kScale3 = kShift2 + 4 * kWidth, kShift3 = kScale3 + 4 * kWide;
  static constexpr uint32_t kActivation = kShift3 + 4 * kWide;  // [2 warpgroups]
  static constexpr uint32_t kActivationBytes = 2 * kBlock;
  static constexpr uint32_t kWeightsHere = kActivation + 2 * kActivationBytes;  // barriers of 8 bytes
  static constexpr uint32_t kFull = kWeightsHere + 8;                           // [2 warpgroups, 2]
  static constexpr uint32_t kEmpty = kFull + 4 * 8;
  static constexpr uint32_t kBytes = hopper::kTileAlignment + kEmpty + 4 * 8;
  static_assert(kBytes <= hopper::kSharedLimit && kWeightsHere % 8 == 0);
  static_assert(kSlots % hopper::kTileAlignment == 0 && kActivation % hopper::kTileAlignment == 0);
  static_assert(kHaloBytes <= kActivationBytes);
  static_assert(kSlots + 3 * kHaloSlot + 128 * hopper::kRowBytes <= kActivation);
};

// The tensor maps of a launch.
struct BottleneckMaps {
  hopper::TensorMapSpec x, w1, w2, w3, out;
};

inline BottleneckMaps bottleneck_maps(const SquareTiles& s, bool bfloat16) {
  return {hopper::image_map(bfloat16, s.images, s.height, s.width, kWide, kHalo, kHalo),
          hopper::matrix_map(bfloat16, kWidth, kWide, kWidth), hopper::matrix_map(bfloat16, kWidth, 9 * kWidth, kWidth),
          hopper::matrix_map(bfloat16, kWide, kWidth, kWide),
          hopper::image_map(bfloat16, s.images, s.height, s.width, kWide, kTile, kTile)};
}

}  // namespace fused_resnet
