// Where a value lies: tiles in shared memory, matrix descriptors, and the registers of wgmma; the roles of threads.
// Plain arithmetic.
//
// Every operand tile has rows of 64 values of 16 bits, 128 bytes, in the 128-byte swizzle: the 16-byte chunk c of row r
// lies at chunk c ^ (r % 8) of its row. The tile starts at a multiple of 1024 bytes, the period of the pattern. Eight
// consecutive rows then have the same column in eight different chunks, that is in all 32 banks, wherever they start.
//
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" (matrix descriptor, register fragments,
// swizzling modes); CuTe, whose make_gmma_desc, 128-byte layouts, CLayout_64xN and ALayout_64x16 give the same
// descriptors, offsets and registers for every tile that the kernels have.
#pragma once

#include <cstdint>

#include "../data_type.h"

namespace fused_resnet::hopper {

constexpr uint32_t kRowValues = 64;            // values of 16 bits in a row of a tile
constexpr uint32_t kRowBytes = 128;            // bytes of a row
constexpr uint32_t kTileAlignment = 1024;      // bytes: eight rows, the period of the swizzle
constexpr uint32_t kStepValues = 16;           // depth of one wgmma at 16 bit
constexpr uint32_t kSharedLimit = 227 * 1024;  // bytes that a block can have

FUSED_RESNET_HD constexpr uint32_t align_up(uint32_t bytes, uint32_t to) { return (bytes + to - 1) / to * to; }

// Offset (bytes) in a tile after the swizzle, from the offset before it: bits 4 to 6 are xor-ed with bits 7 to 9.
FUSED_RESNET_HD constexpr uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 3) & 0x70u); }

// Offset (bytes) of a value in its tile.
FUSED_RESNET_HD constexpr uint32_t tile_offset(uint32_t row, uint32_t column) {
  return swizzle(row * kRowBytes + column * 2);
}

// Descriptor of an operand of wgmma that lies row by row along the depth ("K-major") in a swizzled tile, from the
// address (bytes, in shared memory) of its first row and depth. Fields: bits 0-13 address / 16; 16-29 leading offset,
// not used by swizzled layouts, 1; 32-45 distance of eight-row groups / 16; 49-51 base offset, 0 as tiles are aligned;
// 62-63 swizzle, 1 for 128 bytes. Deeper by 16 values is 32 bytes further: the hardware swizzles the sum.
FUSED_RESNET_HD constexpr uint64_t matrix_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | (uint64_t{1} << 16) |
         (static_cast<uint64_t>(8 * kRowBytes / 16) << 32) | (uint64_t{1} << 62);
}

// The same of an operand that lies row by row along its other dimension, with the depth as rows ("MN-major", the
// transposed one): 64 values wide, or several tiles of 64 side by side, `tile_bytes` apart. The leading offset, bits
// 16-29, is their distance / 16; deeper by 16 values is 16 rows further.
FUSED_RESNET_HD constexpr uint64_t transposed_descriptor(uint32_t address, uint32_t tile_bytes) {
  return (matrix_descriptor(address) & ~(uint64_t{0x3fff} << 16)) | (static_cast<uint64_t>(tile_bytes / 16) << 16);
}
constexpr uint64_t kTransposedStep = kStepValues * kRowBytes / 16;  // to be added to the descriptor

// Row and column of accumulator i of a thread of the warpgroup, in the 64 x N result.
FUSED_RESNET_HD constexpr uint32_t accumulator_row(uint32_t thread, uint32_t i) {
  return thread % 128 / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
FUSED_RESNET_HD constexpr uint32_t accumulator_column(uint32_t thread, uint32_t i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// ldmatrix.x4 of a 16 x 16 fragment of operand A: which row and which eight-value half a lane points at. The result is
// the fragment of wgmma with A in registers: (row, depth), (row + 8, depth), (row, depth + 8), (row + 8, depth + 8),
// the same places that accumulators 8 k .. 8 k + 7 have in a result, so a result can be the next operand A.
FUSED_RESNET_HD constexpr uint32_t fragment_row(uint32_t lane) { return lane % 16; }
FUSED_RESNET_HD constexpr uint32_t fragment_half(uint32_t lane) { return lane / 16; }

// Roles of a block's threads: two warpgroups of consumers, and a third one for the thread or two that produce, because
// setmaxnreg moves registers between whole warpgroups. They are taken from those that the block is launched with:
// asking for more than that waits for ever.
constexpr uint32_t kConsumers = 256;
constexpr uint32_t kThreads = kConsumers + 128;
constexpr uint32_t kLaunchRegisters = 65536 / kThreads / 8 * 8;  // of a thread; ptxas takes all that a block can have
constexpr uint32_t kConsumerRegisters = 232, kProducerRegisters = 40;
static_assert(kConsumerRegisters * kConsumers + kProducerRegisters * 128 <= kLaunchRegisters * kThreads);

// Position in a ring of buffers. A consumer waits for the parity `phase` of a buffer's "full" barrier, the producer for
// the opposite parity of its "empty" barrier, which a fresh barrier passes.
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  FUSED_RESNET_HD void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fused_resnet::hopper
