// A bottleneck of width 64 in one kernel on Hopper, for inference:
//
//   a1 = relu(bn1(x W1))    a2 = relu(bn2(conv3x3(a1, W2)))    out = relu(bn3(a2 W3) + s)
//
// with bn(c) = c scale + shift and the shortcut s = x, of 256 channels, or s = bn(x W) with a projection of 64
// channels. a1 and a2 never leave the chip, rounded to the data's type as if they did; a projection is not even
// rounded. All weights stay in shared memory. Each of two consumer warpgroups works on tiles of 8 x 8 pixels of its
// own, so that one's epilogue runs beside the other's products:
//
//   1. x arrives by TMA on the tile with its halo, 64 channels at a time, zero outside of the image; a1 on the halo.
//      The shortcut's input is the middle of those tiles: each thread keeps its 128 values of it in registers, or its
//      16 as operand A of the projection.
//   2. a1 goes to shared memory, zero outside of the image: the padding comes after BatchNorm and ReLU.
//   3. The 3x3 reads a1 with ldmatrix at shifted rows: operand A in registers, nine taps x 64 channels.
//   4. a2 is packed in registers as the next operand A; four products of 64 channels, each with its epilogue and store.
//
// The machine's instructions come from hopper/ptx.cuh, or from the CPU emulation in the tests, included before.
#pragma once

#include "bn_math.h"
#include "bottleneck_tile.h"
#include "halo_convolution.cuh"

namespace fused_resnet {

struct BottleneckArguments {
  SquareTiles shape;
  FrozenBatchNorm bn1, bn2, bn3, bn_shortcut;  // the last one with a projection
};

template <DataType type, bool kProjection>
struct BottleneckBlock {
  using Memory = BottleneckMemory<kProjection>;
  using TensorMap = hopper::TensorMap;
  static constexpr int kSteps = 4;  // wgmma steps in 64 channels
  // What a thread keeps of x: for each 64 channels its values in the result's places, or operand A of each step.
  using Shortcut = uint32_t[4][kProjection ? 4 : 16];

  const BottleneckArguments& a;
  const TensorMap &x, &w1, &w2, &w3, &w_shortcut, &out;
  const uint32_t base;

  FUSED_RESNET_DEVICE BottleneckBlock(const BottleneckArguments& arguments, const TensorMap& x_map,
                                      const TensorMap& w1_map, const TensorMap& w2_map, const TensorMap& w3_map,
                                      const TensorMap& w_shortcut_map, const TensorMap& out_map)
      : a(arguments),
        x(x_map),
        w1(w1_map),
        w2(w2_map),
        w3(w3_map),
        w_shortcut(w_shortcut_map),
        out(out_map),
        base(hopper::shared_base()) {}

  FUSED_RESNET_DEVICE void run() {
    const uint32_t thread = hopper::thread_index();
    if (thread == 0) {
      hopper::barrier_init(base + Memory::kWeightsHere, 1);
      for (uint32_t i = 0; i < 2 * Memory::kStages; ++i) {
        hopper::barrier_init(base + Memory::kFull + 8 * i, 1);
        hopper::barrier_init(base + Memory::kEmpty + 8 * i, 4);  // warps of the consumer
      }
      hopper::barrier_init_done();
    }
    if (thread < hopper::kConsumers) {
      store_affines(a.bn1, kWidth, Memory::kScale1, thread);
      store_affines(a.bn2, kWidth, Memory::kScale2, thread);
      store_affines(a.bn3, kWide, Memory::kScale3, thread);
      if constexpr (kProjection) store_affines(a.bn_shortcut, kWide, Memory::kScaleShortcut, thread);
      hopper::fence_async_proxy();  // wgmma passes over them, see BottleneckMemory
    }
    hopper::sync_block();
    if (thread >= hopper::kConsumers) {
      hopper::lower_registers<hopper::kProducerRegisters>();
      const uint32_t warp = (thread - hopper::kConsumers) / 32;
      if (warp < 2 && thread % 32 == 0) produce(warp);
    } else {
      hopper::raise_registers<hopper::kConsumerRegisters>();
      consume(thread);
    }
  }

 private:
  // Scale of all channels, and behind them shift.
  FUSED_RESNET_DEVICE void store_affines(const FrozenBatchNorm& bn, uint32_t channels, uint32_t to, uint32_t thread) {
    for (uint32_t i = thread; i < channels; i += hopper::kConsumers) {
      const Affine affine = affine_of(bn, static_cast<int>(i));
      hopper::store_shared_float(base + to + 4 * i, affine.scale);
      hopper::store_shared_float(base + to + 4 * (channels + i), affine.shift);
    }
  }

  FUSED_RESNET_DEVICE uint32_t slot(uint32_t group, uint32_t stage) const {
    return base + Memory::kSlots + (group * Memory::kStages + stage) * kHaloSlot;
  }
  FUSED_RESNET_DEVICE uint32_t full(uint32_t group, uint32_t stage) const {
    return base + Memory::kFull + 8 * (group * Memory::kStages + stage);
  }
  FUSED_RESNET_DEVICE uint32_t empty(uint32_t group, uint32_t stage) const {
    return base + Memory::kEmpty + 8 * (group * Memory::kStages + stage);
  }

  FUSED_RESNET_DEVICE void load_weights() {
    const uint32_t barrier = base + Memory::kWeightsHere;
    hopper::barrier_arrive_expect(barrier, Memory::kWeightBytes);
    for (uint32_t k = 0; k < Memory::kBlocks1; ++k) {
      hopper::load_matrix(base + Memory::kW1 + k * Memory::kBlock, w1, barrier, k * kWidth, 0);
    }
    for (int tap = 0; tap < 9; ++tap) {
      hopper::load_matrix(base + Memory::kW2 + tap * Memory::kBlock, w2, barrier, tap * kWidth, 0);
    }
    hopper::load_matrix(base + Memory::kW3, w3, barrier, 0, 0);
    if constexpr (kProjection) hopper::load_matrix(base + Memory::kWShortcut, w_shortcut, barrier, 0, 0);
  }

  // One thread feeds one consumer warpgroup.
  FUSED_RESNET_DEVICE void produce(uint32_t group) {
    if (group == 0) load_weights();
    hopper::RingPosition at;
    for (int tile = hopper::block_index() * 2 + group; tile < a.shape.count(); tile += hopper::grid_size() * 2) {
      const SquareTile start = a.shape.at(tile);
      for (int c = 0; c < bottleneck_channels(kProjection); c += kWidth) {
        hopper::barrier_wait(empty(group, at.stage), at.phase ^ 1);
        hopper::barrier_arrive_expect(full(group, at.stage), kHaloBytes);
        hopper::load_image(slot(group, at.stage), x, full(group, at.stage), c, start.w - 1, start.h - 1, start.image);
        at.advance(Memory::kStages);
      }
    }
  }

  FUSED_RESNET_DEVICE void consume(uint32_t thread) {
    const uint32_t group = thread / 128;
    hopper::RingPosition at;
    hopper::barrier_wait(base + Memory::kWeightsHere, 0);
    for (int tile = hopper::block_index() * 2 + group; tile < a.shape.count(); tile += hopper::grid_size() * 2) {
      const SquareTile start = a.shape.at(tile);
      Shortcut shortcut;
      uint32_t a2[kSteps][4];
      first_convolution(shortcut, thread, at, start);
      second_convolution(a2, thread);
      third_convolution(a2, shortcut, thread, start);
    }
    // The block's shared memory must outlive the stores that read it.
    if (thread % 128 == 0) hopper::store_wait_read<0>();
  }

  FUSED_RESNET_DEVICE uint32_t activation(uint32_t group) const {
    return base + Memory::kActivation + group * Memory::kActivationBytes;
  }

  // Scale and shift of two neighbouring channels.
  struct AffinePair {
    float scale[2], shift[2];

    FUSED_RESNET_DEVICE float operator()(float value, int j) const { return value * scale[j] + shift[j]; }
    FUSED_RESNET_DEVICE float relu(float value, int j) const {
      value = (*this)(value, j);
      return value < 0.0f ? 0.0f : value;  // a NaN stays one, as in PyTorch
    }
  };
  FUSED_RESNET_DEVICE AffinePair affine(uint32_t scale, uint32_t shift, uint32_t channel) const {
    AffinePair pair;
    hopper::load_shared_pair(pair.scale, base + scale + 4 * channel);
    hopper::load_shared_pair(pair.shift, base + shift + 4 * channel);
    return pair;
  }

  // a1 on the halo, to shared memory; the shortcut's input.
  FUSED_RESNET_DEVICE void first_convolution(Shortcut& shortcut, uint32_t thread, hopper::RingPosition& at,
                                             const SquareTile& start) {
    const uint32_t group = thread / 128;
    float low[32] = {}, high[32] = {};  // rows 0 to 63 and 64 to 127 of the halo tile
#pragma unroll
    for (uint32_t k = 0; k < Memory::kBlocks1; ++k) {
      hopper::barrier_wait(full(group, at.stage), at.phase);
      const uint32_t rows = slot(group, at.stage);
      const uint64_t desc_low = hopper::matrix_descriptor(rows);
      const uint64_t desc_high = hopper::matrix_descriptor(rows + Memory::kBlock);
      const uint64_t desc_w = hopper::matrix_descriptor(base + Memory::kW1 + k * Memory::kBlock);
      hopper::hold(low);
      hopper::hold(high);
      hopper::wgmma_fence();
#pragma unroll
      for (uint32_t step = 0; step < kSteps; ++step) {
        hopper::wgmma<type>(low, desc_low + 2 * step, desc_w + 2 * step);
        hopper::wgmma<type>(high, desc_high + 2 * step, desc_w + 2 * step);
      }
      hopper::wgmma_commit();
      if constexpr (kProjection) {
        load_tap(shortcut, rows, 4, thread);
      } else {
#pragma unroll
        for (uint32_t i = 0; i < 16; ++i) {
          const uint32_t row = halo_row(hopper::accumulator_row(thread, 2 * i), 1, 1);
          const uint32_t column = hopper::accumulator_column(thread, 2 * i);
          shortcut[k][i] = hopper::load_shared(rows + hopper::tile_offset(row, column));
        }
      }
      hopper::wgmma_wait<0>();
      hopper::sync_warp();
      if (thread % 32 == 0) hopper::barrier_arrive(empty(group, at.stage));
      at.advance(Memory::kStages);
    }
    hopper::hold(low);
    hopper::hold(high);
    // The last tile's stores read from where a1 goes.
    if (thread % 128 == 0) hopper::store_wait_read<0>();
    hopper::sync_threads(1 + group, 128);
    store_activation(low, 0, thread, start);
    store_activation(high, 64, thread, start);
    hopper::sync_threads(1 + group, 128);
  }

  FUSED_RESNET_DEVICE void store_activation(const float (&acc)[32], uint32_t first_row, uint32_t thread,
                                            const SquareTile& start) {
#pragma unroll
    for (uint32_t eight = 0; eight < 8; ++eight) {
      const uint32_t column = hopper::accumulator_column(thread, eight * 4);
      const AffinePair bn = affine(Memory::kScale1, Memory::kShift1, column);
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t i = eight * 4 + half * 2, row = first_row + hopper::accumulator_row(thread, i);
        const int h = start.h - 1 + static_cast<int>(row / kHalo), w = start.w - 1 + static_cast<int>(row % kHalo);
        const bool inside = h >= 0 && h < a.shape.height && w >= 0 && w < a.shape.width;
        const uint32_t word = inside ? hopper::pack<type>(bn.relu(acc[i], 0), bn.relu(acc[i + 1], 1)) : 0u;
        if (row < kHalo * kHalo) {
          hopper::store_shared(activation(thread / 128) + hopper::tile_offset(row, column), word);
        }
      }
    }
  }

  // a2 of the tile, as operand A.
  FUSED_RESNET_DEVICE void second_convolution(uint32_t (&a2)[kSteps][4], uint32_t thread) {
    float acc[32] = {};
    convolve_halo<type>(acc, activation(thread / 128), base + Memory::kW2, thread);
#pragma unroll
    for (uint32_t eight = 0; eight < 8; ++eight) {
      const AffinePair bn = affine(Memory::kScale2, Memory::kShift2, hopper::accumulator_column(thread, eight * 4));
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t i = eight * 4 + half * 2;
        a2[eight / 2][eight % 2 * 2 + half] = hopper::pack<type>(bn.relu(acc[i], 0), bn.relu(acc[i + 1], 1));
      }
    }
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) hopper::hold(a2[step]);
    // Results go where a1 was.
    hopper::sync_threads(1 + thread / 128, 128);
  }

  FUSED_RESNET_DEVICE void third_convolution(const uint32_t (&a2)[kSteps][4], const Shortcut& shortcut, uint32_t thread,
                                             const SquareTile& start) {
    const uint32_t group = thread / 128;
#pragma unroll
    for (uint32_t slice = 0; slice < 4; ++slice) {
      float acc[32] = {}, projected[32] = {};
      const uint64_t desc_w = hopper::matrix_descriptor(base + Memory::kW3 + slice * Memory::kBlock);
      hopper::hold(acc);
      if constexpr (kProjection) hopper::hold(projected);
      hopper::wgmma_fence();
#pragma unroll
      for (uint32_t step = 0; step < kSteps; ++step) hopper::wgmma<type>(acc, a2[step], desc_w + 2 * step);
      if constexpr (kProjection) {
        const uint64_t desc = hopper::matrix_descriptor(base + Memory::kWShortcut + slice * Memory::kBlock);
#pragma unroll
        for (uint32_t step = 0; step < kSteps; ++step) {
          hopper::wgmma<type>(projected, shortcut[step], desc + 2 * step);
        }
      }
      hopper::wgmma_commit();
      if (slice >= 2) {
        // Two buffers take turns: at most the last store may still be reading.
        if (thread % 128 == 0) hopper::store_wait_read<1>();
        hopper::sync_threads(1 + group, 128);
      }
      hopper::wgmma_wait<0>();
      hopper::hold(acc);
      if constexpr (kProjection) hopper::hold(projected);
      const uint32_t buffer = activation(group) + slice % 2 * Memory::kBlock;
#pragma unroll
      for (uint32_t eight = 0; eight < 8; ++eight) {
        const uint32_t column = hopper::accumulator_column(thread, eight * 4), channel = slice * kWidth + column;
        const AffinePair bn = affine(Memory::kScale3, Memory::kShift3, channel);
        AffinePair bn_shortcut{};
        if constexpr (kProjection) bn_shortcut = affine(Memory::kScaleShortcut, Memory::kShiftShortcut, channel);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
          const uint32_t i = eight * 4 + half * 2, row = hopper::accumulator_row(thread, i);
          float value[2], beside[2];
          if constexpr (!kProjection) hopper::unpack<type>(shortcut[slice][i / 2], beside[0], beside[1]);
#pragma unroll
          for (uint32_t j = 0; j < 2; ++j) {
            if constexpr (kProjection) beside[j] = bn_shortcut(projected[i + j], j);
            value[j] = bn(acc[i + j], j) + beside[j];
            if (value[j] < 0.0f) value[j] = 0.0f;
          }
          hopper::store_shared(buffer + hopper::tile_offset(row, column), hopper::pack<type>(value[0], value[1]));
        }
      }
      hopper::fence_async_proxy();
      hopper::sync_threads(1 + group, 128);
      if (thread % 128 == 0) {
        hopper::store_image(out, buffer, slice * kWidth, start.w, start.h, start.image);
        hopper::store_commit();
      }
    }
  }
};

}  // namespace fused_resnet
