// Tiles of 8 x 8 output pixels, and the halo that a 3x3 convolution of stride 1 reads around them. Plain arithmetic.
#pragma once

#include <cstdint>

#include "hopper/layout.h"

namespace fused_resnet {

constexpr int kTile = 8;          // output pixels of a tile, in both directions
constexpr int kHalo = kTile + 2;  // pixels that it reads

// The first output pixel of a tile.
struct SquareTile {
  int image, h, w;
};

// Tiles of images of height x width; those at the border may hang over it.
struct SquareTiles {
  int images, height, width;

  FUSED_RESNET_HD int across() const { return (width + kTile - 1) / kTile; }
  FUSED_RESNET_HD int down() const { return (height + kTile - 1) / kTile; }
  FUSED_RESNET_HD int count() const { return images * down() * across(); }
  FUSED_RESNET_HD SquareTile at(int tile) const {
    const int row = tile / across();
    return {row / down(), row % down() * kTile, tile % across() * kTile};
  }
};

// The row of the halo tile that output pixel `row` (0 to 63) of the tile reads at tap (r, s); its own is at (1, 1).
FUSED_RESNET_HD constexpr uint32_t halo_row(uint32_t row, uint32_t r, uint32_t s) {
  return (row / kTile + r) * kHalo + row % kTile + s;
}

// A halo tile in shared memory: its 100 rows of 64 channels, and with alignment.
constexpr uint32_t kHaloBytes = kHalo * kHalo * hopper::kRowBytes;
constexpr uint32_t kHaloSlot = hopper::align_up(kHaloBytes, hopper::kTileAlignment);

}  // namespace fused_resnet
