// What both 3x3 convolutions do with their sums: epilogue, channel statistics, and the way to memory.
//
// A warpgroup has 64 output pixels x kBlockN filters in the registers of wgmma. Results leave through two swizzled
// buffers of 64 x 64 and TMA stores, which clip what lies outside of the tensor; the side tensor (residual, or the
// ReLU's input) comes into the same buffers by TMA, loaded before the main loop, and is replaced in place.
//
// The machine's instructions come from hopper/ptx.cuh, or from the CPU emulation in the tests, included before.
#pragma once

#include "bn_math.h"
#include "conv3x3_tile.h"

namespace fused_resnet {

struct Conv3x3Arguments {
  Conv3x3Shape shape;
  int partial_rows;
  FrozenBatchNorm frozen;  // kAffine: of the output; mean null: out = acc + side
  const float* bn;         // kReluGradient: [5, filters] of the side tensor: mean, rstd, scale, shift, 1 / count
  float* partials;         // [partial_rows, 3 or 2, filters]
  bool side;               // kAffine: add the side tensor,
  const uint8_t* mask;     // of which only the values whose bit is set, [pixels, filters / 8]; null: all
  bool relu;               // kAffine
};

// Which output pixels the 64 rows of a warpgroup are: consecutive ones, over [pixels, filters] ...
struct PixelRun {
  int first;

  FUSED_RESNET_HD bool inside(const Conv3x3Shape& s, uint32_t row) const {
    return first + static_cast<int>(row) < s.pixels();
  }
  FUSED_RESNET_HD int64_t index(const Conv3x3Shape&, uint32_t row) const { return int64_t{first} + row; }
  FUSED_RESNET_DEVICE void load(uint32_t to, const hopper::TensorMap& map, uint32_t barrier, int column) const {
    hopper::load_matrix(to, map, barrier, column, first);
  }
  FUSED_RESNET_DEVICE void store(const hopper::TensorMap& map, uint32_t from, int column) const {
    hopper::store_matrix(map, from, column, first);
  }
};

// ... or a square of 8 x 8, over [images, height, width, filters].
struct PixelSquare {
  SquareTile tile;

  FUSED_RESNET_HD bool inside(const Conv3x3Shape& s, uint32_t row) const {
    return tile.image < s.images && tile.h + static_cast<int>(row / kTile) < s.height &&
           tile.w + static_cast<int>(row % kTile) < s.width;
  }
  FUSED_RESNET_HD int64_t index(const Conv3x3Shape& s, uint32_t row) const {
    return (int64_t{tile.image} * s.height + tile.h + row / kTile) * s.width + tile.w + row % kTile;
  }
  FUSED_RESNET_DEVICE void load(uint32_t to, const hopper::TensorMap& map, uint32_t barrier, int column) const {
    hopper::load_image(to, map, barrier, column, tile.w, tile.h, tile.image);
  }
  FUSED_RESNET_DEVICE void store(const hopper::TensorMap& map, uint32_t from, int column) const {
    hopper::store_image(map, from, column, tile.w, tile.h, tile.image);
  }
};

// One for each consumer thread. Memory says where buffers, sums, counts, vectors and the side tensor's barriers lie.
template <DataType type, int kBlockN, Epilogue kEpilogue, typename Memory>
struct Conv3x3Output {
  using TensorMap = hopper::TensorMap;
  static constexpr int kSlices = kBlockN / 64;
  static constexpr int kSlots = kEpilogue == Epilogue::kAffine ? 1 : kBlockN / 4;  // channels of a thread with sums

  const Conv3x3Arguments& a;
  const TensorMap &out, &side;
  const uint32_t base, thread;
  uint32_t side_phase = 0, buffer = 0;
  // Of this thread's channels: mean and M2, or the two sums.
  float first[kSlots] = {}, second[kSlots] = {}, count = 0.0f;

  FUSED_RESNET_DEVICE Conv3x3Output(const Conv3x3Arguments& arguments, const TensorMap& out_map,
                                    const TensorMap& side_map, uint32_t shared, uint32_t thread_index)
      : a(arguments), out(out_map), side(side_map), base(shared), thread(thread_index) {}

  FUSED_RESNET_DEVICE void begin_row() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) first[slot] = second[slot] = 0.0f;
    count = 0.0f;
  }

  // All slices of the tile's side tensor, into the buffers that the slices will use.
  template <typename Pixels>
  FUSED_RESNET_DEVICE void begin_tile(const Pixels& pixels, int column) {
    if constexpr (kSlices <= 2) {
      if (!has_side() || thread % 128 != 0) return;
      hopper::store_wait_read<2 - kSlices>();
      hopper::barrier_arrive_expect(side_barrier(), kSlices * Memory::kBuffer);
      for (int slice = 0; slice < kSlices; ++slice) {
        pixels.load(buffer_address(buffer ^ slice), side, side_barrier(), column + slice * 64);
      }
    }
  }

  template <typename Pixels>
  FUSED_RESNET_DEVICE void end_tile(const float (&acc)[kBlockN / 2], const Pixels& pixels, int column) {
    if constexpr (kEpilogue == Epilogue::kStatistics) add_statistics(acc, pixels);
    if (has_side()) {
      hopper::barrier_wait(side_barrier(), side_phase);
      side_phase ^= 1;
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      store_slice(acc, slice, pixels, column + slice * 64);
      buffer ^= 1;
    }
  }

  FUSED_RESNET_DEVICE void end_row(int row, int column) {
    if constexpr (kEpilogue != Epilogue::kAffine) store_partials(row, column);
  }

  FUSED_RESNET_DEVICE void end(int used_rows) {
    if constexpr (kEpilogue != Epilogue::kAffine) clear_unused_rows(used_rows);
    // The block's shared memory must outlive the stores that read it.
    if (thread % 128 == 0) hopper::store_wait_read<0>();
  }

 private:
  FUSED_RESNET_DEVICE bool has_side() const {
    return kEpilogue == Epilogue::kReluGradient || (kEpilogue == Epilogue::kAffine && kBlockN < 256 && a.side);
  }
  FUSED_RESNET_DEVICE uint32_t side_barrier() const { return base + Memory::kSide + 8 * (thread / 128); }
  FUSED_RESNET_DEVICE uint32_t buffer_address(uint32_t which) const {
    return base + Memory::kBuffers + (thread / 128 * 2 + which) * Memory::kBuffer;
  }
  FUSED_RESNET_DEVICE uint32_t vectors() const { return base + Memory::kVectors + thread / 128 * 3 * 64 * 4; }

  // Scale, shift and, of kReluGradient, mean of 64 filters, one by each of as many threads, before the warpgroup meets.
  FUSED_RESNET_DEVICE void prepare_vectors(int column) {
    if (thread % 128 >= 64) return;
    const int filter = column + static_cast<int>(thread % 128);
    const uint32_t to = vectors() + thread % 128 * 4;
    Affine affine{1.0f, 0.0f};
    if constexpr (kEpilogue == Epilogue::kReluGradient) {
      affine = {a.bn[2 * a.shape.filters + filter], a.bn[3 * a.shape.filters + filter]};
      hopper::store_shared_float(to + 2 * 64 * 4, a.bn[filter]);
    } else if (a.frozen.mean != nullptr) {
      affine = affine_of(a.frozen, filter);
    }
    hopper::store_shared_float(to, affine.scale);
    hopper::store_shared_float(to + 64 * 4, affine.shift);
  }

  // Welford's update, a row at a time: all of a thread's channels have the same count.
  template <typename Pixels>
  FUSED_RESNET_DEVICE void add_statistics(const float (&acc)[kBlockN / 2], const Pixels& pixels) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!pixels.inside(a.shape, hopper::accumulator_row(thread, 2 * half))) continue;
      count += 1.0f;
      const float weight = 1.0f / count;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float value = acc[slot / 2 * 4 + half * 2 + slot % 2];
        const float delta = value - first[slot];
        first[slot] += delta * weight;
        second[slot] += delta * (value - first[slot]);
      }
    }
  }

  // 64 pixels x 64 filters through a buffer to memory.
  template <typename Pixels>
  FUSED_RESNET_DEVICE void store_slice(const float (&acc)[kBlockN / 2], int slice, const Pixels& pixels, int column) {
    const uint32_t from = buffer_address(buffer);
    // Two buffers take turns: at most the last store may still be reading.
    if (!has_side() && thread % 128 == 0) hopper::store_wait_read<1>();
    if constexpr (kEpilogue != Epilogue::kStatistics) prepare_vectors(column);
    hopper::sync_threads(1 + thread / 128, 128);
#pragma unroll
    for (int eight = 0; eight < 8; ++eight) {
      const uint32_t local = hopper::accumulator_column(thread, eight * 4);
      float scale[2], shift[2], mean[2];
      if constexpr (kEpilogue != Epilogue::kStatistics) {
        hopper::load_shared_pair(scale, vectors() + local * 4);
        hopper::load_shared_pair(shift, vectors() + (64 + local) * 4);
      }
      if constexpr (kEpilogue == Epilogue::kReluGradient) {
        hopper::load_shared_pair(mean, vectors() + (2 * 64 + local) * 4);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = slice * 32 + eight * 4 + half * 2;
        const uint32_t row = hopper::accumulator_row(thread, i);
        const uint32_t address = from + hopper::tile_offset(row, local);
        const bool inside = kEpilogue != Epilogue::kStatistics && pixels.inside(a.shape, row);
        float beside[2] = {}, value[2];
        if (has_side()) hopper::unpack<type>(hopper::load_shared(address), beside[0], beside[1]);
        if (kEpilogue == Epilogue::kAffine && a.mask != nullptr) {
          const int64_t byte = (pixels.index(a.shape, row) * a.shape.filters + column) / 8 + eight;
          const int bits = inside ? a.mask[byte] >> local % 8 : 0;
          for (int j = 0; j < 2; ++j) beside[j] = bits >> j & 1 ? beside[j] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          value[j] = acc[i + j];
          if constexpr (kEpilogue == Epilogue::kAffine) {
            value[j] = value[j] * scale[j] + shift[j] + beside[j];
            if (a.relu && value[j] < 0.0f) value[j] = 0.0f;  // a NaN stays one, as in PyTorch
          }
          if constexpr (kEpilogue == Epilogue::kReluGradient) {
            // Outside of the images nothing counts: not even what the padding there would see.
            const int slot = slice * 16 + eight * 2 + j;
            value[j] = inside && beside[j] * scale[j] + shift[j] > 0.0f ? value[j] : 0.0f;
            first[slot] += value[j];
            second[slot] += value[j] * (beside[j] - mean[j]);
          }
        }
        hopper::store_shared(address, hopper::pack<type>(value[0], value[1]));
      }
    }
    hopper::fence_async_proxy();
    hopper::sync_threads(1 + thread / 128, 128);
    if (thread % 128 == 0) {
      if (pixels.inside(a.shape, 0)) pixels.store(out, from, column);
      hopper::store_commit();
    }
  }

  // The row of partial sums: over the eight lanes with the same channels, then over the eight warps, in fixed order.
  FUSED_RESNET_DEVICE void store_partials(int row, int column) {
    constexpr bool kMerge = kEpilogue == Epilogue::kStatistics;
    const uint32_t warp = thread / 32, sums = base + Memory::kSums, counts = base + Memory::kCounts;
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      const float other = hopper::shuffle_xor(count, lanes);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float other_first = hopper::shuffle_xor(first[slot], lanes);
        const float other_second = hopper::shuffle_xor(second[slot], lanes);
        if (kMerge) {
          merge_into(count, first[slot], second[slot], other, other_first, other_second);
        } else {
          first[slot] += other_first;
          second[slot] += other_second;
        }
      }
      count += other;
    }
    if (thread % 32 < 4) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const uint32_t local = hopper::accumulator_column(thread, slot / 2 * 4 + slot % 2);
        hopper::store_shared_float(sums + (warp * kBlockN + local) * 8, first[slot]);
        hopper::store_shared_float(sums + (warp * kBlockN + local) * 8 + 4, second[slot]);
      }
      if (thread % 32 == 0) hopper::store_shared_float(counts + warp * 4, count);
    }
    hopper::sync_threads(3, hopper::kConsumers);
    if (thread < kBlockN) {
      float total = 0.0f, sum0 = 0.0f, sum1 = 0.0f;
      for (uint32_t i = 0; i < hopper::kConsumers / 32; ++i) {
        const float first_i = hopper::load_shared_float(sums + (i * kBlockN + thread) * 8);
        const float second_i = hopper::load_shared_float(sums + (i * kBlockN + thread) * 8 + 4);
        if (kMerge) {
          const float count_i = hopper::load_shared_float(counts + i * 4);
          merge_into(total, sum0, sum1, count_i, first_i, second_i);
          total += count_i;
        } else {
          sum0 += first_i;
          sum1 += second_i;
        }
      }
      const int filters = a.shape.filters, channel = column + thread;
      float* partials = a.partials + static_cast<int64_t>(row) * (kMerge ? 3 : 2) * filters + channel;
      if (kMerge) {
        partials[0] = total;
        partials[filters] = sum0;
        partials[2 * filters] = sum1;
      } else {
        partials[0] = sum0;
        partials[filters] = sum1 * a.bn[filters + channel];
      }
    }
    hopper::sync_threads(3, hopper::kConsumers);
  }

  FUSED_RESNET_DEVICE void clear_unused_rows(int used_rows) {
    const int width = (kEpilogue == Epilogue::kStatistics ? 3 : 2) * a.shape.filters;
    for (int i = used_rows * width + hopper::block_index() * hopper::kConsumers + thread; i < a.partial_rows * width;
         i += hopper::grid_size() * hopper::kConsumers) {
      a.partials[i] = 0.0f;
    }
  }
};

}  // namespace fused_resnet
