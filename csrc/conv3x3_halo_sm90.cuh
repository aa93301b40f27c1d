// 3x3 convolution of stride 1, 64 to 64 channels, on Hopper: every pixel of x comes to the chip once, not nine times.
//
// The products of these layers are few, 64 channels deep and wide, so that fetching their operands for every tap would
// take longer than multiplying them. All weights stay in shared memory. Each of two consumer warpgroups has a ring of
// halo tiles, 10 x 10 pixels around 8 x 8, filled by a producer thread of its own, and reads them with ldmatrix at
// shifted rows: operand A in registers.
//
// The machine's instructions come from hopper/ptx.cuh, or from the CPU emulation in the tests, included before.
#pragma once

#include "conv3x3_output.cuh"
#include "halo_convolution.cuh"

namespace fused_resnet {

template <DataType type, Epilogue kEpilogue>
struct Conv3x3HaloBlock {
  using Memory = HaloMemory<kEpilogue>;
  using TensorMap = hopper::TensorMap;
  using Output = Conv3x3Output<type, 64, kEpilogue, Memory>;

  const Conv3x3Arguments& a;
  const TensorMap &x, &w, &out, &side;
  const Conv3x3Work work;
  const uint32_t base;

  FUSED_RESNET_DEVICE Conv3x3HaloBlock(const Conv3x3Arguments& arguments, const TensorMap& x_map,
                                       const TensorMap& w_map, const TensorMap& out_map, const TensorMap& side_map)
      : a(arguments),
        x(x_map),
        w(w_map),
        out(out_map),
        side(side_map),
        work(halo_work(arguments.shape, arguments.partial_rows)),
        base(hopper::shared_base()) {}

  FUSED_RESNET_DEVICE void run() {
    const uint32_t thread = hopper::thread_index();
    if (thread == 0) {
      hopper::barrier_init(base + Memory::kWeightsHere, 1);
      for (uint32_t i = 0; i < 2 * Memory::kStages; ++i) {
        hopper::barrier_init(base + Memory::kFull + 8 * i, 1);
        hopper::barrier_init(base + Memory::kEmpty + 8 * i, 4);  // warps of the consumer
      }
      for (uint32_t i = 0; i < 2; ++i) hopper::barrier_init(base + Memory::kSide + 8 * i, 1);
      hopper::barrier_init_done();
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
  FUSED_RESNET_DEVICE uint32_t slot(uint32_t group, uint32_t stage) const {
    return base + Memory::kSlots + (group * Memory::kStages + stage) * kHaloSlot;
  }
  FUSED_RESNET_DEVICE uint32_t full(uint32_t group, uint32_t stage) const {
    return base + Memory::kFull + 8 * (group * Memory::kStages + stage);
  }
  FUSED_RESNET_DEVICE uint32_t empty(uint32_t group, uint32_t stage) const {
    return base + Memory::kEmpty + 8 * (group * Memory::kStages + stage);
  }

  // One thread feeds one consumer warpgroup.
  FUSED_RESNET_DEVICE void produce(uint32_t group) {
    if (group == 0) {
      const uint32_t barrier = base + Memory::kWeightsHere;
      hopper::barrier_arrive_expect(barrier, Memory::kWeightBytes);
      for (int tap = 0; tap < 9; ++tap) {
        hopper::load_matrix(base + tap * 64 * hopper::kRowBytes, w, barrier, tap * 64, 0);
      }
    }
    const SquareTiles squares = halo_tiles(a.shape);
    hopper::RingPosition at;
    for (int row = hopper::block_index(); row < work.rows; row += hopper::grid_size()) {
      for (int tile = work.first_tile(row); tile < work.first_tile(row + 1); ++tile) {
        const SquareTile square = squares.at(2 * tile + group);
        hopper::barrier_wait(empty(group, at.stage), at.phase ^ 1);
        hopper::barrier_arrive_expect(full(group, at.stage), kHaloBytes);
        hopper::load_image(slot(group, at.stage), x, full(group, at.stage), 0, square.w - 1, square.h - 1,
                           square.image);
        at.advance(Memory::kStages);
      }
    }
  }

  FUSED_RESNET_DEVICE void consume(uint32_t thread) {
    const uint32_t group = thread / 128;
    const SquareTiles squares = halo_tiles(a.shape);
    Output output(a, out, side, base, thread);
    hopper::RingPosition at;
    hopper::barrier_wait(base + Memory::kWeightsHere, 0);
    for (int row = hopper::block_index(); row < work.rows; row += hopper::grid_size()) {
      output.begin_row();
      for (int tile = work.first_tile(row); tile < work.first_tile(row + 1); ++tile) {
        const PixelSquare pixels{squares.at(2 * tile + group)};
        output.begin_tile(pixels, 0);
        hopper::barrier_wait(full(group, at.stage), at.phase);
        float acc[32] = {};
        convolve_halo<type>(acc, slot(group, at.stage), base, thread);
        hopper::sync_warp();
        if (thread % 32 == 0) hopper::barrier_arrive(empty(group, at.stage));
        at.advance(Memory::kStages);
        output.end_tile(acc, pixels, 0);
      }
      output.end_row(row, 0);
    }
    output.end(work.rows);
  }
};

}  // namespace fused_resnet
