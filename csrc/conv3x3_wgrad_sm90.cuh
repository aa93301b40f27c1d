// Weight gradient of the 3x3 convolution on Hopper, over the output's pixels m = (n, p, q):
//
//   dw[k, r, s, c] = sum_m g[m, k] x[n, p * stride - 1 + r, q * stride - 1 + s, c]
//
// A GEMM whose depth is the pixels: both operands lie with the depth as rows, as TMA brings them, and wgmma reads them
// transposed. A block sums one chunk of the pixels for a row of taps, r, of 64 channels; the three taps of the row are
// three im2col loads side by side, one operand of 192 columns. Chunks come from the shape alone, and their partial
// results are added in order by a second kernel: the same input gives the same bits, on any card.
//
// The machine's instructions come from hopper/ptx.cuh, or from the CPU emulation in the tests, included before.
#pragma once

#include "conv3x3_wgrad_tile.h"

namespace fused_resnet {

struct WgradArguments {
  Conv3x3Shape shape;
  int parts;
  float* dw;  // [parts, filters, 3, 3, channels]
};

template <DataType type, int kFilters>
struct WgradBlock {
  using Memory = WgradMemory<kFilters>;
  using TensorMap = hopper::TensorMap;
  static constexpr bool kTakeTurns = kFilters == 64;      // warpgroups at the stages
  static constexpr int kTiles = kFilters == 256 ? 2 : 1;  // of 64 filters of a warpgroup

  const WgradArguments& a;
  const TensorMap &x, &g;
  const WgradWork work;
  const WgradItem item;
  const uint32_t base;

  FUSED_RESNET_DEVICE WgradBlock(const WgradArguments& arguments, const TensorMap& x_map, const TensorMap& g_map)
      : a(arguments),
        x(x_map),
        g(g_map),
        work(wgrad_work(arguments.shape, arguments.parts)),
        item(work.item(hopper::block_index())),
        base(hopper::shared_base()) {}

  FUSED_RESNET_DEVICE void run() {
    const uint32_t thread = hopper::thread_index();
    if (thread == 0) {
      for (uint32_t i = 0; i < Memory::kStages; ++i) {
        hopper::barrier_init(full(i), 1);
        hopper::barrier_init(empty(i), (kTakeTurns ? 128 : hopper::kConsumers) / 32);
      }
      hopper::barrier_init_done();
    }
    hopper::sync_block();
    if (thread >= hopper::kConsumers) {
      hopper::lower_registers<hopper::kProducerRegisters>();
      if (thread == hopper::kConsumers) produce();
    } else {
      hopper::raise_registers<hopper::kConsumerRegisters>();
      consume(thread);
    }
  }

 private:
  FUSED_RESNET_DEVICE uint32_t full(uint32_t stage) const { return base + Memory::kFull + 8 * stage; }
  FUSED_RESNET_DEVICE uint32_t empty(uint32_t stage) const { return base + Memory::kEmpty + 8 * stage; }

  FUSED_RESNET_DEVICE void produce() {
    hopper::RingPosition at;
    for (int stage = work.first_stage(item.chunk); stage < work.first_stage(item.chunk + 1); ++stage) {
      const int pixel = stage * kWgradPixels;
      const LoadStart start = load_start(a.shape, pixel);
      hopper::barrier_wait(empty(at.stage), at.phase ^ 1);
      hopper::barrier_arrive_expect(full(at.stage), Memory::kStage);
      const uint32_t to = base + at.stage * Memory::kStage;
      for (int tap = 0; tap < 3; ++tap) {
        hopper::load_convolution(to + tap * Memory::kTile, x, full(at.stage), item.channel, start.w, start.h,
                                 start.image, tap, item.row);
      }
      for (int i = 0; i < kFilters / 64; ++i) {
        hopper::load_matrix(to + Memory::kGradient + i * Memory::kTile, g, full(at.stage), item.filter + 64 * i, pixel);
      }
      at.advance(Memory::kStages);
    }
  }

  FUSED_RESNET_DEVICE void consume(uint32_t thread) {
    const uint32_t group = thread / 128;
    const int stages = work.first_stage(item.chunk + 1) - work.first_stage(item.chunk);
    const int first = kTakeTurns ? group : 0;
    hopper::RingPosition at;
    for (int i = 0; i < first; ++i) at.advance(Memory::kStages);
    uint32_t last = 0;
    float acc[kTiles][kWgradColumns / 2] = {};
    for (int i = first; i < stages; i += kTakeTurns ? 2 : 1) {
      hopper::barrier_wait(full(at.stage), at.phase);
      const uint32_t stage = base + at.stage * Memory::kStage;
      const uint64_t desc_x = hopper::transposed_descriptor(stage, Memory::kTile);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) hopper::hold(acc[tile]);
      hopper::wgmma_fence();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t filters = kTakeTurns ? 0 : group * kTiles + tile;
        const uint64_t desc_g = hopper::transposed_descriptor(stage + Memory::kGradient + filters * Memory::kTile, 0);
#pragma unroll
        for (uint64_t step = 0; step < kWgradPixels / hopper::kStepValues; ++step) {
          hopper::wgmma_transposed<type>(acc[tile], desc_g + step * hopper::kTransposedStep,
                                         desc_x + step * hopper::kTransposedStep);
        }
      }
      hopper::wgmma_commit();
      // One group stays in flight: the stage of the one before is free.
      hopper::wgmma_wait<1>();
      if (i > first && thread % 32 == 0) hopper::barrier_arrive(empty(last));
      last = at.stage;
      for (int turn = 0; turn < (kTakeTurns ? 2 : 1); ++turn) at.advance(Memory::kStages);
    }
    hopper::wgmma_wait<0>();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) hopper::hold(acc[tile]);
    const int64_t part = kTakeTurns ? 2 * item.chunk + group : item.chunk;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kWgradColumns / 2; i += 2) {
        const int filter = item.filter + (kTakeTurns ? 0 : group * kTiles + tile) * 64 +
                           static_cast<int>(hopper::accumulator_row(thread, i));
        const int column = static_cast<int>(hopper::accumulator_column(thread, i));
        const int64_t tap = ((part * a.shape.filters + filter) * 3 + item.row) * 3 + column / 64;
        float* to = a.dw + tap * a.shape.channels + item.channel + column % 64;
        to[0] = acc[tile][i];
        to[1] = acc[tile][i + 1];
      }
    }
  }
};

}  // namespace fused_resnet
