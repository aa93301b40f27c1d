// A 3x3 convolution of stride 1, 64 to 64 channels, on a halo tile that is whole in shared memory: a warpgroup's
// products.
//
// The machine's instructions come from hopper/ptx.cuh, or from the CPU emulation in the tests, included before.
#pragma once

#include "square_tile.h"

namespace fused_resnet {

// The fragments of operand A of one tap: 64 pixels, 64 channels. Shifted rows are as good as any for ldmatrix.
FUSED_RESNET_DEVICE void load_tap(uint32_t (&fragments)[4][4], uint32_t halo, uint32_t tap, uint32_t thread) {
  const uint32_t pixel = thread % 128 / 32 * 16 + hopper::fragment_row(thread % 32);
  const uint32_t row = halo_row(pixel, tap / 3, tap % 3);
#pragma unroll
  for (uint32_t step = 0; step < 4; ++step) {
    const uint32_t column = step * hopper::kStepValues + hopper::fragment_half(thread % 32) * 8;
    hopper::load_fragment(fragments[step], halo + hopper::tile_offset(row, column));
  }
}

// acc [64 pixels, 64 filters] += the nine taps; halo and weights [9, 64, 64] are addresses in shared memory.
template <DataType type>
FUSED_RESNET_DEVICE void convolve_halo(float (&acc)[32], uint32_t halo, uint32_t weights, uint32_t thread) {
  uint32_t fragments[2][4][4];
  load_tap(fragments[0], halo, 0, thread);
#pragma unroll
  for (uint32_t tap = 0; tap < 9; ++tap) {
    const uint64_t desc_w = hopper::matrix_descriptor(weights + tap * 64 * hopper::kRowBytes);
    hopper::hold(acc);
    hopper::wgmma_fence();
#pragma unroll
    for (uint32_t step = 0; step < 4; ++step) {
      hopper::wgmma<type>(acc, fragments[tap % 2][step], desc_w + 2 * step);
    }
    hopper::wgmma_commit();
    if (tap < 8) {
      hopper::wgmma_wait<1>();  // the tap before, whose registers the next one takes
      load_tap(fragments[(tap + 1) % 2], halo, tap + 1, thread);
    }
  }
  hopper::wgmma_wait<0>();
  hopper::hold(acc);
}

}  // namespace fused_resnet
