// How the weight gradient of the 3x3 convolution is cut into work. Plain arithmetic.
#pragma once

#include "conv3x3_tile.h"

namespace fused_resnet {

constexpr int kWgradPixels = 64;    // depth of a stage
constexpr int kWgradColumns = 192;  // of a product: three taps in a row x 64 channels

// Filters of a block. A block of 64 has one warpgroup's worth of them: its two warpgroups take turns at the stages, and
// each has a row of partial results of its own.
FUSED_RESNET_HD constexpr int wgrad_filters(int filters) {
  return filters % 256 == 0 ? 256 : filters % 128 == 0 ? 128 : 64;
}
FUSED_RESNET_HD constexpr int wgrad_parts_per_chunk(int filters) { return wgrad_filters(filters) == 64 ? 2 : 1; }

// Block i of a launch: a chunk of the pixels, a row of taps, 64 channels, and some filters. Neighbours read the same
// pixels.
struct WgradItem {
  int chunk, row, channel, filter;
};

struct WgradWork {
  int stages, chunks, channels, filters, block_filters;

  FUSED_RESNET_HD int items() const { return chunks * 3 * (channels / 64) * (filters / block_filters); }
  FUSED_RESNET_HD WgradItem item(int i) const {
    const int by_filter = filters / block_filters, by_channel = channels / 64;
    return {i / (by_filter * by_channel * 3), i / (by_filter * by_channel) % 3, i / by_filter % by_channel * 64,
            i % by_filter * block_filters};
  }
  // Chunks take equal shares of the stages.
  FUSED_RESNET_HD int first_stage(int chunk) const {
    return static_cast<int>(static_cast<int64_t>(chunk) * stages / chunks);
  }
};

// `parts`: rows of the table of partial results, a multiple of wgrad_parts_per_chunk.
FUSED_RESNET_HD WgradWork wgrad_work(const Conv3x3Shape& s, int parts) {
  return {(s.pixels() - 1) / kWgradPixels + 1, parts / wgrad_parts_per_chunk(s.filters), s.channels, s.filters,
          wgrad_filters(s.filters)};
}

// Shared memory, bytes from an aligned start: the ring of stages, each three taps of x and the gradient, and barriers.
template <int kFilters>
struct WgradMemory {
  static constexpr uint32_t kStages = kFilters == 256 ? 4 : kFilters == 128 ? 5 : 6;
  static constexpr uint32_t kTile = kWgradPixels * hopper::kRowBytes;
  static constexpr uint32_t kGradient = 3 * kTile;
  static constexpr uint32_t kStage = kGradient + kFilters / 64 * kTile;
  static constexpr uint32_t kFull = kStages * kStage;
  static constexpr uint32_t kEmpty = kFull + kStages * 8;
  static constexpr uint32_t kBytes = hopper::kTileAlignment + kEmpty + kStages * 8;
  static_assert(kBytes <= hopper::kSharedLimit && kTile % hopper::kTileAlignment == 0);
};

struct WgradMaps {
  hopper::TensorMapSpec x, g;
};

inline WgradMaps wgrad_maps(const Conv3x3Shape& s, bool bfloat16) {
  return {hopper::convolution_map(bfloat16, s.images, s.height, s.width, s.channels, 3, 1, s.stride, kWgradPixels),
          hopper::matrix_map(bfloat16, s.pixels(), s.filters, kWgradPixels)};
}

}  // namespace fused_resnet
