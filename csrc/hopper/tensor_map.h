// What a TMA tensor map says, as plain numbers: built here, encoded by tensor_map.cu, read by the tests' emulation.
//
// Source: CUDA driver API, cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col, whose limits `fault` checks; PTX ISA,
// "im2col mode". CUTLASS's convolutions for sm90, forward and weight gradient, encode the same maps of activations and
// start their loads at the same coordinates and offsets.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fused_resnet::hopper {

// Dimensions run from the innermost one outwards: (channels, width, height, images) for an activation. Values have 16
// bits, memory is dense, boxes arrive in the 128-byte swizzle, what lies outside of the tensor as zero.
struct TensorMapSpec {
  bool im2col;
  bool bfloat16;
  int rank;
  uint64_t extent[4];
  // Tiled: the box to copy.
  uint32_t box[4];
  // Im2col: `pixels` positions x `channels` are copied. Positions start at the given coordinates and walk along width,
  // height, images in steps of `step` within [lower, extent - 1 + upper] of width and of height.
  int lower;
  int upper;
  uint32_t channels;
  uint32_t pixels;
  uint32_t step;

  uint64_t stride_bytes(int dimension) const {  // of dimension + 1
    uint64_t bytes = 2;
    for (int i = 0; i <= dimension; ++i) bytes *= extent[i];
    return bytes;
  }
};

// A matrix [rows, columns], copied in boxes of box_rows x 64 values.
inline TensorMapSpec matrix_map(bool bfloat16, uint64_t rows, uint64_t columns, uint32_t box_rows) {
  return {false, bfloat16, 2, {columns, rows, 1, 1}, {kRowValues, box_rows, 1, 1}, 0, 0, 0, 0, 1};
}

// An activation [n, h, w, c], copied in boxes of box_h x box_w pixels x 64 channels.
inline TensorMapSpec image_map(bool bfloat16, uint64_t n, uint64_t h, uint64_t w, uint64_t c, uint32_t box_h,
                               uint32_t box_w) {
  return {false, bfloat16, 4, {c, w, h, n}, {kRowValues, box_w, box_h, 1}, 0, 0, 0, 0, 1};
}

// The same, copied as rows of the implicit GEMM of a convolution: `pixels` consecutive output pixels x 64 channels of
// one tap. The box of positions is that of tap (0, 0); the load's offsets move it to another tap.
inline TensorMapSpec convolution_map(bool bfloat16, uint64_t n, uint64_t h, uint64_t w, uint64_t c, uint32_t taps,
                                     uint32_t padding, uint32_t stride, uint32_t pixels) {
  const int lower = -static_cast<int>(padding);
  const int upper = static_cast<int>(padding) - static_cast<int>(taps - 1);
  return {true, bfloat16, 4, {c, w, h, n}, {}, lower, upper, kRowValues, pixels, stride};
}

// Which limit of the driver a map breaks, null if none.
inline const char* fault(const TensorMapSpec& map) {
  for (int i = 0; i < map.rank; ++i) {
    if (map.extent[i] == 0 || map.extent[i] > (uint64_t{1} << 32)) return "an extent is not in 1 .. 2^32";
    if (i + 1 < map.rank && (map.stride_bytes(i) % 16 != 0 || map.stride_bytes(i) >= (uint64_t{1} << 40))) {
      return "a stride is no multiple of 16 bytes, or 2^40 or more";
    }
    if (!map.im2col && (map.box[i] == 0 || map.box[i] > 256)) return "an extent of the box is not in 1 .. 256";
  }
  if (!map.im2col) return map.box[0] * 2 > kRowBytes ? "the box is wider than the swizzle" : nullptr;
  if (map.lower < -128 || map.lower > 127 || map.upper < -128 || map.upper > 127) return "a corner is not in +-128";
  for (int i = 1; i <= 2; ++i) {
    if (static_cast<int64_t>(map.extent[i]) + map.upper - map.lower <= 0) return "the box of positions is empty";
  }
  if (map.channels * 2 > kRowBytes) return "the channels are wider than the swizzle";
  if (map.pixels == 0 || map.pixels > 1024) return "the pixels are not in 1 .. 1024";
  return map.step == 0 || map.step > 8 ? "the stride is not in 1 .. 8" : nullptr;
}

}  // namespace fused_resnet::hopper
