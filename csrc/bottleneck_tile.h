// How a bottleneck is cut into tiles, and where they lie in shared memory. Plain arithmetic.
#pragma once

#include <cstdint>

#include "hopper/layout.h"
#include "hopper/tensor_map.h"
#include "square_tile.h"

namespace fused_resnet {

constexpr int kWidth = 64;  // channels of the inner tensors
constexpr int kWide = 256;  // channels of the output, and of x where it is the shortcut itself

// Channels of x: a projection brings 64 to 256.
constexpr int bottleneck_channels(bool projection) { return projection ? kWidth : kWide; }

// Shared memory, bytes from an aligned start. Of 227 KiB:
//
//   136 KiB  weights of the three convolutions, resident: 4 x [64, 64], 9 x [64, 64], [256, 64];
//            with a projection 144 KiB: [64, 64], 9 x [64, 64], [256, 64], [256, 64]
//    52 KiB  two slots for each warpgroup: 10 x 10 pixels of x, 64 channels (100 rows, 104 with alignment);
//            with a projection one slot each, 26 KiB, that holds all of x's channels
//     3 KiB  scale and shift of the BatchNorms; 5 KiB
//    32 KiB  for each warpgroup the first convolution's activation on the halo (100 rows), and in its place, when the
//            3x3 has read it, two buffers of 64 pixels x 64 channels of the result
//
// wgmma reads 128 rows of a slot: the 28 beyond the halo belong to the next slot, or to the vectors behind the last
// one, and only reach rows of the product that nobody uses.
template <bool kProjection>
struct BottleneckMemory {
  static constexpr uint32_t kBlock = 64 * hopper::kRowBytes;  // 64 rows
  static constexpr uint32_t kBlocks1 = bottleneck_channels(kProjection) / 64;
  static constexpr uint32_t kW1 = 0;
  static constexpr uint32_t kW2 = kW1 + kBlocks1 * kBlock;
  static constexpr uint32_t kW3 = kW2 + 9 * kBlock;
  static constexpr uint32_t kWShortcut = kW3 + 4 * kBlock;
  static constexpr uint32_t kWeightBytes = kWShortcut + (kProjection ? 4 * kBlock : 0);
  static constexpr uint32_t kStages = kProjection ? 1 : 2;
  static constexpr uint32_t kSlots = kWeightBytes;  // [2 warpgroups, kStages]
  static constexpr uint32_t kScale1 = kSlots + 2 * kStages * kHaloSlot, kShift1 = kScale1 + 4 * kWidth;
  static constexpr uint32_t kScale2 = kShift1 + 4 * kWidth, kShift2 = kScale2 + 4 * kWidth;
  static constexpr uint32_t kScale3 = kShift2 + 4 * kWidth, kShift3 = kScale3 + 4 * kWide;
  static constexpr uint32_t kScaleShortcut = kShift3 + 4 * kWide, kShiftShortcut = kScaleShortcut + 4 * kWide;
  static constexpr uint32_t kActivation = kProjection ? kShiftShortcut + 4 * kWide : kScaleShortcut;  // [2 warpgroups]
  static constexpr uint32_t kActivationBytes = 2 * kBlock;
  static constexpr uint32_t kWeightsHere = kActivation + 2 * kActivationBytes;  // barriers of 8 bytes
  static constexpr uint32_t kFull = kWeightsHere + 8;                           // [2 warpgroups, kStages]
  static constexpr uint32_t kEmpty = kFull + 2 * kStages * 8;
  static constexpr uint32_t kBytes = hopper::kTileAlignment + kEmpty + 2 * kStages * 8;
  static_assert(kBytes <= hopper::kSharedLimit && kWeightsHere % 8 == 0);
  static_assert(kSlots % hopper::kTileAlignment == 0 && kActivation % hopper::kTileAlignment == 0);
  static_assert(kHaloBytes <= kActivationBytes);
  static_assert(kSlots + (2 * kStages - 1) * kHaloSlot + 128 * hopper::kRowBytes <= kActivation);
};

// The tensor maps of a launch; that of the shortcut's weight is that of w3.
struct BottleneckMaps {
  hopper::TensorMapSpec x, w1, w2, w3, out;
};

inline BottleneckMaps bottleneck_maps(const SquareTiles& s, bool bfloat16, bool projection) {
  const int channels = bottleneck_channels(projection);
  return {hopper::image_map(bfloat16, s.images, s.height, s.width, channels, kHalo, kHalo),
          hopper::matrix_map(bfloat16, kWidth, channels, kWidth),
          hopper::matrix_map(bfloat16, kWidth, 9 * kWidth, kWidth), hopper::matrix_map(bfloat16, kWide, kWidth, kWide),
          hopper::image_map(bfloat16, s.images, s.height, s.width, kWide, kTile, kTile)};
}

}  // namespace fused_resnet
