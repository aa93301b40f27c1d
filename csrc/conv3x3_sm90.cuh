// 3x3 convolution as an implicit GEMM on Hopper: TMA im2col loads, wgmma, a producer warp and two consumer warpgroups.
//
//   acc[m, k] = sum_{r, s, c} x[n, p * stride - 1 + r, q * stride - 1 + s, c] w[k, r, s, c]        rows m = (n, p, q)
//
// x is zero outside of the image; products at 16 bit, sums in fp32. A block takes work items (`Conv3x3Work`) until none
// is left. Its producer thread fills a ring of operand tiles, 128 pixels and kBlockN filters x 64 channels of one tap,
// and runs ahead into the next tile while the consumers are in the epilogue of this one. Each consumer warpgroup owns
// 64 pixels. Results leave through swizzled buffers and TMA stores, which clip the last tile; the side tensor (residual
// or the ReLU's input) comes into the same buffers by TMA, loaded before the main loop, and is replaced in place.
//
// The machine's instructions come from hopper/ptx.cuh, or from the CPU emulation in the tests, included before.
#pragma once

#include "conv3x3_tile.h"

namespace fused_resnet {

struct Conv3x3Arguments {
  Conv3x3Shape shape;
  int partial_rows;
  const float* bn;      // [5, filters]: mean, rstd, scale, shift, 1 / count; null (kAffine): out = acc + side
  float* partials;      // [partial_rows, 3 or 2, filters]
  bool side;            // kAffine: add the side tensor,
  const uint8_t* mask;  // of which only the values whose bit is set, [pixels, filters / 8]; null: all
  bool relu;            // kAffine
};

template <DataType type, int kBlockN, Epilogue kEpilogue>
struct Conv3x3Block {
  using Memory = Conv3x3Memory<kBlockN, kEpilogue>;
  using TensorMap = hopper::TensorMap;
  static constexpr int kSlices = kBlockN / 64;
  static constexpr int kSlots = kEpilogue == Epilogue::kAffine ? 1 : kBlockN / 4;  // channels of a thread with sums
  static constexpr uint32_t kConsumers = 256;
  static constexpr uint32_t kThreads = kConsumers + 128;  // setmaxnreg counts in warpgroups: three producer warps idle

  const Conv3x3Arguments& a;
  const TensorMap &x, &w, &out, &side;
  const Conv3x3Work work;
  const uint32_t base;

  FUSED_RESNET_DEVICE Conv3x3Block(const Conv3x3Arguments& arguments, const TensorMap& x_map, const TensorMap& w_map,
                                   const TensorMap& out_map, const TensorMap& side_map)
      : a(arguments),
        x(x_map),
        w(w_map),
        out(out_map),
        side(side_map),
        work(conv3x3_work(arguments.shape, kBlockN, arguments.partial_rows)),
        base(hopper::shared_base()) {}

  FUSED_RESNET_DEVICE void run() {
    const uint32_t thread = hopper::thread_index();
    if (thread == 0) {
      for (uint32_t i = 0; i < Memory::kStages; ++i) {
        hopper::barrier_init(full(i), 1);
        hopper::barrier_init(empty(i), kConsumers / 32);
      }
      for (uint32_t i = 0; i < 2; ++i) hopper::barrier_init(base + Memory::kSide + 8 * i, 1);
      hopper::barrier_init_done();
    }
    hopper::sync_block();
    if (thread >= kConsumers) {
      hopper::lower_registers<40>();
      if (thread == kConsumers) produce();
    } else {
      hopper::raise_registers<232>();
      consume(thread);
    }
  }

 private:
  FUSED_RESNET_DEVICE uint32_t full(uint32_t stage) const { return base + Memory::kFull + 8 * stage; }
  FUSED_RESNET_DEVICE uint32_t empty(uint32_t stage) const { return base + Memory::kEmpty + 8 * stage; }

  FUSED_RESNET_DEVICE void produce() {
    hopper::prefetch_map(x);
    hopper::prefetch_map(w);
    hopper::RingPosition at;
    for (int item = hopper::block_index(); item < work.items(); item += hopper::grid_size()) {
      const int row = item / work.columns, column = item % work.columns * kBlockN;
      for (int tile = work.first_tile(row); tile < work.first_tile(row + 1); ++tile) {
        const LoadStart start = load_start(a.shape, tile * kBlockM);
        for (int tap = 0; tap < 9; ++tap) {
          for (int c = 0; c < a.shape.channels; c += hopper::kRowValues) {
            hopper::barrier_wait(empty(at.stage), at.phase ^ 1);
            hopper::barrier_arrive_expect(full(at.stage), Memory::kStage);
            const uint32_t to = base + at.stage * Memory::kStage;
            hopper::load_convolution(to, x, full(at.stage), c, start.w, start.h, start.image, tap % 3, tap / 3);
            hopper::load_matrix(to + Memory::kA, w, full(at.stage), tap * a.shape.channels + c, column);
            at.advance(Memory::kStages);
          }
        }
      }
    }
  }

  FUSED_RESNET_DEVICE void consume(uint32_t thread) {
    const uint32_t group = thread / 128;
    const bool leader = thread % 128 == 0;
    const int steps = 9 * (a.shape.channels / static_cast<int>(hopper::kRowValues));
    hopper::RingPosition at;
    uint32_t side_phase = 0, buffer = 0;
    for (int item = hopper::block_index(); item < work.items(); item += hopper::grid_size()) {
      const int row = item / work.columns, column = item % work.columns * kBlockN;
      // Of this thread's channels: mean and M2, or the two sums.
      float first[kSlots] = {}, second[kSlots] = {}, count = 0.0f;
      for (int tile = work.first_tile(row); tile < work.first_tile(row + 1); ++tile) {
        const int pixel = tile * kBlockM + group * 64;
        if (has_side() && leader) load_side(group, buffer, column, pixel);
        float acc[kBlockN / 2] = {};
        for (int step = 0; step < steps; ++step) {
          hopper::barrier_wait(full(at.stage), at.phase);
          const uint32_t stage = base + at.stage * Memory::kStage;
          const uint64_t desc_a = hopper::matrix_descriptor(stage + group * Memory::kBuffer);
          const uint64_t desc_b = hopper::matrix_descriptor(stage + Memory::kA);
          hopper::hold(acc);
          hopper::wgmma_fence();
#pragma unroll
          for (uint32_t k = 0; k < hopper::kRowValues / hopper::kStepValues; ++k) {
            hopper::wgmma<type>(acc, desc_a + 2 * k, desc_b + 2 * k);
          }
          hopper::wgmma_commit();
          // One group stays in flight: the tile of the step before is free.
          hopper::wgmma_wait<1>();
          if (step > 0 && thread % 32 == 0) hopper::barrier_arrive(empty((at.stage ? at.stage : Memory::kStages) - 1));
          at.advance(Memory::kStages);
        }
        hopper::wgmma_wait<0>();
        hopper::hold(acc);
        if (thread % 32 == 0) hopper::barrier_arrive(empty((at.stage ? at.stage : Memory::kStages) - 1));
        if constexpr (kEpilogue == Epilogue::kStatistics) add_statistics(acc, first, second, count, thread, pixel);
        if (has_side()) {
          hopper::barrier_wait(base + Memory::kSide + 8 * group, side_phase);
          side_phase ^= 1;
        }
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          store_slice(acc, slice, first, second, thread, buffer, column + slice * 64, pixel);
          buffer ^= 1;
        }
      }
      if constexpr (kEpilogue != Epilogue::kAffine) store_partials(first, second, count, thread, row, column);
    }
    if constexpr (kEpilogue != Epilogue::kAffine) clear_unused_rows(thread);
    // The block's shared memory must outlive the stores that read it.
    if (leader) hopper::store_wait_read<0>();
  }

  FUSED_RESNET_DEVICE bool has_side() const {
    return kEpilogue == Epilogue::kReluGradient || (kEpilogue == Epilogue::kAffine && kBlockN < 256 && a.side);
  }

  FUSED_RESNET_DEVICE uint32_t buffer_address(uint32_t group, uint32_t buffer) const {
    return base + Memory::kBuffers + (group * 2 + buffer) * Memory::kBuffer;
  }

  // All slices of the tile's side tensor, into the buffers that the slices will use.
  FUSED_RESNET_DEVICE void load_side(uint32_t group, uint32_t buffer, int column, int pixel) {
    if constexpr (kSlices <= 2) {
      hopper::store_wait_read<2 - kSlices>();
      const uint32_t barrier = base + Memory::kSide + 8 * group;
      hopper::barrier_arrive_expect(barrier, kSlices * Memory::kBuffer);
      for (int slice = 0; slice < kSlices; ++slice) {
        hopper::load_matrix(buffer_address(group, buffer ^ slice), side, barrier, column + slice * 64, pixel);
      }
    }
  }

  // Welford's update, a row at a time: all of a thread's channels have the same count.
  FUSED_RESNET_DEVICE void add_statistics(const float (&acc)[kBlockN / 2], float (&mean)[kSlots], float (&m2)[kSlots],
                                          float& count, uint32_t thread, int pixel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pixel + static_cast<int>(hopper::accumulator_row(thread, 2 * half)) >= a.shape.pixels()) continue;
      count += 1.0f;
      const float weight = 1.0f / count;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float value = acc[slot / 2 * 4 + half * 2 + slot % 2];
        const float delta = value - mean[slot];
        mean[slot] += delta * weight;
        m2[slot] += delta * (value - mean[slot]);
      }
    }
  }

  // 64 pixels x 64 filters through a buffer to memory.
  FUSED_RESNET_DEVICE void store_slice(const float (&acc)[kBlockN / 2], int slice, float (&sum_g)[kSlots],
                                       float (&sum_x)[kSlots], uint32_t thread, uint32_t buffer, int column,
                                       int pixel) {
    const uint32_t group = thread / 128, from = buffer_address(group, buffer);
    const int filters = a.shape.filters;
    if (!has_side()) {
      // Two buffers take turns: at most the last store may still be reading.
      if (thread % 128 == 0) hopper::store_wait_read<1>();
      hopper::sync_threads(1 + group, 128);
    }
#pragma unroll
    for (int eight = 0; eight < 8; ++eight) {
      const uint32_t local = hopper::accumulator_column(thread, eight * 4);
      float scale[2] = {1.0f, 1.0f}, shift[2] = {}, mean[2] = {};
      if (kEpilogue != Epilogue::kStatistics && a.bn != nullptr) {
        for (int j = 0; j < 2; ++j) {
          const float* bn = a.bn + column + local + j;
          scale[j] = bn[2 * filters];
          shift[j] = bn[3 * filters];
          if (kEpilogue == Epilogue::kReluGradient) mean[j] = bn[0];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = slice * 32 + eight * 4 + half * 2;
        const uint32_t address = from + hopper::tile_offset(hopper::accumulator_row(thread, i), local);
        float beside[2] = {}, value[2];
        if (has_side()) hopper::unpack<type>(hopper::load_shared(address), beside[0], beside[1]);
        if (kEpilogue == Epilogue::kAffine && a.mask != nullptr) {
          const int64_t row = pixel + hopper::accumulator_row(thread, i);
          const int bits = row < a.shape.pixels() ? a.mask[(row * filters + column) / 8 + eight] >> local % 8 : 0;
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
            // Beyond the last pixel acc is 0, as everything there is loaded as zero.
            const int slot = slice * 16 + eight * 2 + j;
            value[j] = beside[j] * scale[j] + shift[j] > 0.0f ? value[j] : 0.0f;
            sum_g[slot] += value[j];
            sum_x[slot] += value[j] * (beside[j] - mean[j]);
          }
        }
        hopper::store_shared(address, hopper::pack<type>(value[0], value[1]));
      }
    }
    hopper::fence_async_proxy();
    hopper::sync_threads(1 + group, 128);
    if (thread % 128 == 0) {
      if (pixel < a.shape.pixels()) hopper::store_matrix(out, from, column, pixel);
      hopper::store_commit();
    }
  }

  // The row of partial sums: over the eight lanes with the same channels, then over the eight warps, in fixed order.
  FUSED_RESNET_DEVICE void store_partials(float (&first)[kSlots], float (&second)[kSlots], float count, uint32_t thread,
                                          int row, int column) {
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
    hopper::sync_threads(3, kConsumers);
    if (thread < kBlockN) {
      float total = 0.0f, sum0 = 0.0f, sum1 = 0.0f;
      for (uint32_t i = 0; i < kConsumers / 32; ++i) {
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
    hopper::sync_threads(3, kConsumers);
  }

  FUSED_RESNET_DEVICE void clear_unused_rows(uint32_t thread) {
    const int width = (kEpilogue == Epilogue::kStatistics ? 3 : 2) * a.shape.filters;
    for (int i = work.rows * width + hopper::block_index() * kConsumers + thread; i < a.partial_rows * width;
         i += hopper::grid_size() * kConsumers) {
      a.partials[i] = 0.0f;
    }
  }
};

}  // namespace fused_resnet
