// How a bottleneck is cut into tiles, and where they lie in shared memory. Plain arithmetic.
#pragma once

#include <cstdint>

#include "hopper/layout.h"
#include "hopper/tensor_map.h"

namespace fused_resnet {

constexpr int kWidth = 64;        // channels of the inner tensors
constexpr int kWide = 256;        // channels of x and out
constexpr int kTile = 8;          // output pixels of a tile, in both directions
constexpr int kHalo = kTile + 2;  // pixels of x that it needs

// x and out [images, height, width, 256] in memory.
struct BottleneckShape {
  int images, height, width;

  FUSED_RESNET_HD int tiles_h() const { return (height + kTile - 1) / kTile; }
  FUSED_RESNET_HD int tiles_w() const { return (width + kTile - 1) / kTile; }
  FUSED_RESNET_HD int tiles() const { return images * tiles_h() * tiles_w(); }
};

// The first output pixel of a tile.
struct BottleneckTile {
  int image, h, w;
};

FUSED_RESNET_HD BottleneckTile bottleneck_tile(const BottleneckShape& s, int tile) {
  const int row = tile / s.tiles_w();
  return {row / s.tiles_h(), row % s.tiles_h() * kTile, tile % s.tiles_w() * kTile};
}

// The row of the halo tile that output pixel `row` (0 to 63) of the tile reads at tap (r, s); its own is at (1, 1).
FUSED_RESNET_HD constexpr uint32_t halo_row(uint32_t row, uint32_t r, uint32_t s) {
  return (row / kTile + r) * kHalo + row % kTile + s;
}

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
  static constexpr uint32_t kSlotBytes = kHalo * kHalo * hopper::kRowBytes;
  static constexpr uint32_t kSlot = hopper::align_up(kSlotBytes, hopper::kTileAlignment);
  static constexpr uint32_t kSlots = kWeightBytes;  // [2 warpgroups, 2]
  static constexpr uint32_t kVectors = kSlots + 4 * kSlot;
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
  static_assert(kSlotBytes <= kActivationBytes);
  static_assert(kSlots + 3 * kSlot + 128 * hopper::kRowBytes <= kActivation);
};

// The tensor maps of a launch.
struct BottleneckMaps {
  hopper::TensorMapSpec x, w1, w2, w3, out;
};

inline BottleneckMaps bottleneck_maps(const BottleneckShape& s, bool bfloat16) {
  return {hopper::image_map(bfloat16, s.images, s.height, s.width, kWide, kHalo, kHalo),
          hopper::matrix_map(bfloat16, kWidth, kWide, kWidth), hopper::matrix_map(bfloat16, kWidth, 9 * kWidth, kWidth),
          hopper::matrix_map(bfloat16, kWide, kWidth, kWide),
          hopper::image_map(bfloat16, s.images, s.height, s.width, kWide, kTile, kTile)};
}

}  // namespace fused_resnet
