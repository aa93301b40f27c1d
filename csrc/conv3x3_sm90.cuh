// 3x3 convolution as an implicit GEMM on Hopper: TMA im2col loads, wgmma, a producer warp and two consumer warpgroups.
//
//   acc[m, k] = sum_{r, s, c} x[n, p * stride - 1 + r, q * stride - 1 + s, c] w[k, r, s, c]        rows m = (n, p, q)
//
// x is zero outside of the image; products at 16 bit, sums in fp32. A block takes work items (`Conv3x3Work`) until none
// is left. Its producer thread fills a ring of operand tiles, 128 pixels and kBlockN filters x 64 channels of one tap,
// and runs ahead into the next tile while the consumers are in the epilogue of this one. Each consumer warpgroup owns
// 64 pixels; `Conv3x3Output` is what it does with them.
//
// The machine's instructions come from hopper/ptx.cuh, or from the CPU emulation in the tests, included before.
#pragma once

#include "conv3x3_output.cuh"

namespace fused_resnet {

template <DataType type, int kBlockN, Epilogue kEpilogue>
struct Conv3x3Block {
  using Memory = Conv3x3Memory<kBlockN, kEpilogue>;
  using TensorMap = hopper::TensorMap;
  using Output = Conv3x3Output<type, kBlockN, kEpilogue, Memory>;

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
        hopper::barrier_init(empty(i), hopper::kConsumers / 32);
      }
      for (uint32_t i = 0; i < 2; ++i) hopper::barrier_init(base + Memory::kSide + 8 * i, 1);
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
    const int steps = 9 * (a.shape.channels / static_cast<int>(hopper::kRowValues));
    Output output(a, out, side, base, thread);
    hopper::RingPosition at;
    for (int item = hopper::block_index(); item < work.items(); item += hopper::grid_size()) {
      const int row = item / work.columns, column = item % work.columns * kBlockN;
      output.begin_row();
      for (int tile = work.first_tile(row); tile < work.first_tile(row + 1); ++tile) {
        const PixelRun pixels{tile * kBlockM + static_cast<int>(group) * 64};
        output.begin_tile(pixels, column);
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
        output.end_tile(acc, pixels, column);
      }
      output.end_row(row, column);
    }
    output.end(work.rows);
  }
};

}  // namespace fused_resnet
