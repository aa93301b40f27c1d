// How the 3x3 convolution is cut into work, and where its pieces lie in shared memory. Plain arithmetic.
#pragma once

#include <cstdint>

#include "hopper/layout.h"
#include "hopper/tensor_map.h"
#include "square_tile.h"

namespace fused_resnet {

// x [images, height, width, channels] and w [filters, 3, 3, channels] in memory; padding 1, dilation 1.
struct Conv3x3Shape {
  int images, height, width, channels, filters, stride;

  FUSED_RESNET_HD int out_height() const { return (height - 1) / stride + 1; }
  FUSED_RESNET_HD int out_width() const { return (width - 1) / stride + 1; }
  FUSED_RESNET_HD int pixels() const { return images * out_height() * out_width(); }
};

enum class Epilogue {
  kStatistics,    // out = acc; partials [rows, 3, filters] = count, mean, M2 of acc
  kAffine,        // out = relu?(acc * scale + shift + side), of side only what a bit mask marks if there is one
  kReluGradient,  // out = acc where side * scale + shift > 0; partials [rows, 2, filters] = sum out, sum out * xhat
};

constexpr int kBlockM = 128;  // output pixels of a tile: 64 for each of two consumer warpgroups

// Work item i of a launch: the tiles of row i / columns of the work, of the filters [i % columns * kBlockN, ...). A row
// is a run of consecutive tiles that one block works off in order, with one row of partial sums: which block does it,
// and when, changes no bit. Rows take equal shares of the tiles, and neighbouring items read the same pixels.
struct Conv3x3Work {
  int tiles, rows, columns;

  FUSED_RESNET_HD int items() const { return rows * columns; }
  FUSED_RESNET_HD int first_tile(int row) const { return static_cast<int>(static_cast<int64_t>(row) * tiles / rows); }
};

// `partial_rows`: rows of the table of partial sums, 0 without one; rows that get no tile are zero.
FUSED_RESNET_HD Conv3x3Work conv3x3_work(const Conv3x3Shape& shape, int block_n, int partial_rows) {
  const int tiles = (shape.pixels() - 1) / kBlockM + 1;
  const int rows = partial_rows > 0 && partial_rows < tiles ? partial_rows : tiles;
  return {tiles, rows, shape.filters / block_n};
}

// An output pixel as the start of an im2col load: image, and position of tap (0, 0).
struct LoadStart {
  int image, h, w;
};

FUSED_RESNET_HD LoadStart load_start(const Conv3x3Shape& shape, int pixel) {
  const int out_w = shape.out_width(), row = pixel / out_w;
  return {row / shape.out_height(), row % shape.out_height() * shape.stride - 1, pixel % out_w * shape.stride - 1};
}

// Filters of a tile. A wide tile loads less for its arithmetic, a narrow one leaves fewer SMs idle in the last round;
// the time of a round grows like the data it loads. Results do not depend on it.
inline int conv3x3_block_n(const Conv3x3Shape& shape, Epilogue epilogue, bool side, int partial_rows, int sms) {
  int best = 64;
  int64_t best_cost = -1;
  // 256 filters leave no registers for sums, and no room for the side tensor's tile.
  for (int block_n = 64; block_n <= (epilogue == Epilogue::kAffine && !side ? 256 : 128); block_n *= 2) {
    if (shape.filters % block_n != 0) break;
    const int items = conv3x3_work(shape, block_n, partial_rows).items();
    const int64_t cost = static_cast<int64_t>((items + sms - 1) / sms) * (kBlockM + block_n);
    if (best_cost < 0 || cost <= best_cost) best = block_n, best_cost = cost;
  }
  return best;
}

// Shared memory, bytes from an aligned start: the ring of operand tiles, two buffers of 64 x 64 results (and of the
// side tensor in their place) for each consumer, the sums of the eight consumer warps, the vectors of the 64 filters
// that each consumer is about to write, and the barriers.
template <int kBlockN, Epilogue kEpilogue>
struct Conv3x3Memory {
  static constexpr uint32_t kStages = kBlockN == 256 ? 4 : kBlockN == 128 ? 5 : 6;
  static constexpr uint32_t kA = kBlockM * hopper::kRowBytes;
  static constexpr uint32_t kStage = kA + kBlockN * hopper::kRowBytes;
  static constexpr uint32_t kBuffer = 64 * hopper::kRowBytes;
  static constexpr uint32_t kBuffers = kStages * kStage;
  static constexpr uint32_t kSums = kBuffers + 4 * kBuffer;  // [8 warps, kBlockN, 2] and [8 warps] floats
  static constexpr uint32_t kCounts = kSums + (kEpilogue == Epilogue::kAffine ? 0 : 8 * kBlockN * 2 * 4);
  static constexpr uint32_t kVectors = kCounts + 8 * 4;         // [2 warpgroups, 3, 64] floats
  static constexpr uint32_t kFull = kVectors + 2 * 3 * 64 * 4;  // barriers of 8 bytes
  static constexpr uint32_t kEmpty = kFull + kStages * 8;
  static constexpr uint32_t kSide = kEmpty + kStages * 8;
  static constexpr uint32_t kBytes = hopper::kTileAlignment + kSide + 2 * 8;
  static_assert(kBytes <= hopper::kSharedLimit && kFull % 8 == 0 && kStage % hopper::kTileAlignment == 0);
};

// The tensor maps of a launch.
struct Conv3x3Maps {
  hopper::TensorMapSpec x, w, out;  // the side tensor has the map of `out`
};

inline Conv3x3Maps conv3x3_maps(const Conv3x3Shape& s, bool bfloat16, int block_n) {
  return {hopper::convolution_map(bfloat16, s.images, s.height, s.width, s.channels, 3, 1, s.stride, kBlockM),
          hopper::matrix_map(bfloat16, s.filters, uint64_t{9} * s.channels, block_n),
          hopper::matrix_map(bfloat16, s.pixels(), s.filters, 64)};
}

// 64 to 64 channels at stride 1, the widest maps of a ResNet, have a kernel of their own that reads x once, not for
// every tap: nine weights of 8 KiB stay in shared memory, beside tiles of 8 x 8 pixels with their halo.
FUSED_RESNET_HD bool conv3x3_reads_halos(const Conv3x3Shape& s) {
  return s.channels == 64 && s.filters == 64 && s.stride == 1;
}

FUSED_RESNET_HD SquareTiles halo_tiles(const Conv3x3Shape& s) { return {s.images, s.height, s.width}; }

// Its work: tiles are pairs of squares, one for each of two consumer warpgroups; the last pair may be half empty.
FUSED_RESNET_HD Conv3x3Work halo_work(const Conv3x3Shape& s, int partial_rows) {
  const int tiles = (halo_tiles(s).count() + 1) / 2;
  return {tiles, partial_rows > 0 && partial_rows < tiles ? partial_rows : tiles, 1};
}

// Its shared memory: weights, four halo tiles for each consumer, and the rest as above.
template <Epilogue kEpilogue>
struct HaloMemory {
  static constexpr uint32_t kStages = 4;
  static constexpr uint32_t kWeightBytes = 9 * 64 * hopper::kRowBytes;
  static constexpr uint32_t kSlots = kWeightBytes;  // [2 warpgroups, kStages]
  static constexpr uint32_t kBuffer = 64 * hopper::kRowBytes;
  static constexpr uint32_t kBuffers = kSlots + 2 * kStages * kHaloSlot;
  static constexpr uint32_t kSums = kBuffers + 4 * kBuffer;
  static constexpr uint32_t kCounts = kSums + (kEpilogue == Epilogue::kAffine ? 0 : 8 * 64 * 2 * 4);
  static constexpr uint32_t kVectors = kCounts + 8 * 4;         // [2 warpgroups, 3, 64] floats
  static constexpr uint32_t kFull = kVectors + 2 * 3 * 64 * 4;  // [2 warpgroups, kStages]
  static constexpr uint32_t kEmpty = kFull + 2 * kStages * 8;
  static constexpr uint32_t kSide = kEmpty + 2 * kStages * 8;
  static constexpr uint32_t kWeightsHere = kSide + 2 * 8;
  static constexpr uint32_t kBytes = hopper::kTileAlignment + kWeightsHere + 8;
  static_assert(kBytes <= hopper::kSharedLimit && kFull % 8 == 0);
  static_assert(kBuffers % hopper::kTileAlignment == 0 && kSlots % hopper::kTileAlignment == 0);
};

inline Conv3x3Maps halo_maps(const Conv3x3Shape& s, bool bfloat16) {
  return {hopper::image_map(bfloat16, s.images, s.height, s.width, s.channels, kHalo, kHalo),
          hopper::matrix_map(bfloat16, s.filters, uint64_t{9} * s.channels, 64),
          hopper::image_map(bfloat16, s.images, s.height, s.width, s.filters, kTile, kTile)};
}

// Count, mean and M2 of the union of two sets, into the first one.
FUSED_RESNET_HD void merge_into(float count, float& mean, float& m2, float other_count, float other_mean,
                                float other_m2) {
  const float total = count + other_count;
  const float weight = total > 0.0f ? other_count / total : 0.0f;
  const float delta = other_mean - mean;
  mean += delta * weight;
  m2 += other_m2 + delta * delta * (count * weight);
}

}  // namespace fused_resnet
