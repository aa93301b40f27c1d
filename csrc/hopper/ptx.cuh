// The instructions of Hopper that the kernels use, one small function each, with no logic of their own.
//
// Own inline PTX instead of CuTe's atoms: the kernels need a few copies, one matrix instruction at four widths and a
// handful of barrier operations. That is this file, which reads in five minutes, builds in seconds and adds no header
// package to the build, where CuTe would bring 6 MB of templates and half a minute for each kernel. The price, that
// encodings must be right without a library's checks, is paid by layout.h, whose arithmetic the tests run on the host,
// and by kernels that name no instruction themselves: tests/hopper_machine.h implements these functions on the CPU, and
// the same kernel source runs there against the reference.
//
// Shared memory is addressed by 32-bit addresses in its own window. Everything here needs sm_90a.
//
// Source: PTX ISA 8.x, sections "mbarrier", "cp.async.bulk.tensor", "wgmma", "ldmatrix", "setmaxnreg". The wrappers of
// CuTe and CUTLASS (mma_sm90_gmma.hpp, copy_sm90_tma.hpp, barrier.h) compile to the same machine instructions, but for
// the cache hint of their tiled loads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "layout.h"
#include "tensor_map.cuh"

namespace fused_resnet::hopper {

#define FUSED_RESNET_DEVICE __device__ __forceinline__

FUSED_RESNET_DEVICE uint32_t thread_index() { return threadIdx.x; }
FUSED_RESNET_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FUSED_RESNET_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }

// Start of the dynamic shared memory, rounded up to the alignment of tiles.
FUSED_RESNET_DEVICE uint32_t shared_base() {
  extern __shared__ uint8_t shared_memory[];
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
  return (address + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
}

// Ordinary shared memory

FUSED_RESNET_DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
FUSED_RESNET_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
FUSED_RESNET_DEVICE void store_shared_float(uint32_t address, float value) {
  store_shared(address, __float_as_uint(value));
}
FUSED_RESNET_DEVICE float load_shared_float(uint32_t address) { return __uint_as_float(load_shared(address)); }
FUSED_RESNET_DEVICE void load_shared_pair(float (&pair)[2], uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair[0]), "=f"(pair[1]) : "r"(address) : "memory");
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
FUSED_RESNET_DEVICE void load_fragment(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// Two values of 16 bits in a word, the first in the low half; rounded to nearest even.

template <DataType type>
FUSED_RESNET_DEVICE uint32_t pack(float first, float second) {
  uint32_t word;
  if constexpr (type == DataType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
}
template <DataType type>
FUSED_RESNET_DEVICE void unpack(uint32_t word, float& first, float& second) {
  if constexpr (type == DataType::kBFloat16) {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
  } else {
    first = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    second = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
}

// Threads

FUSED_RESNET_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }
FUSED_RESNET_DEVICE void sync_warp() { __syncwarp(); }
FUSED_RESNET_DEVICE void sync_block() { __syncthreads(); }
// `threads` threads of the block, whole warps, meet at barrier `id` (1 to 15).
FUSED_RESNET_DEVICE void sync_threads(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <uint32_t kRegisters>
FUSED_RESNET_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <uint32_t kRegisters>
FUSED_RESNET_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// mbarriers: a phase ends when `arrivals` threads have arrived and all announced bytes have come

FUSED_RESNET_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the last barrier_init, before the block meets.
FUSED_RESNET_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FUSED_RESNET_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
FUSED_RESNET_DEVICE void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of that parity is over.
FUSED_RESNET_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// TMA: one thread issues the copy of a whole box

FUSED_RESNET_DEVICE void load_matrix(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
FUSED_RESNET_DEVICE void load_image(uint32_t to, const TensorMap& map, uint32_t barrier, int c, int w, int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}
FUSED_RESNET_DEVICE void load_convolution(uint32_t to, const TensorMap& map, uint32_t barrier, int c, int w, int h,
                                          int n, uint16_t tap_w, uint16_t tap_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(tap_w), "h"(tap_h)
      : "memory");
}
FUSED_RESNET_DEVICE void store_matrix(const TensorMap& map, uint32_t from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(from), "r"(column), "r"(row)
               : "memory");
}
FUSED_RESNET_DEVICE void store_image(const TensorMap& map, uint32_t from, int c, int w, int h, int n) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(c), "r"(w), "r"(h), "r"(n)
               : "memory");
}
FUSED_RESNET_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's stores still read shared memory.
template <int kPending>
FUSED_RESNET_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Makes this thread's ordinary writes to shared memory visible to TMA and wgmma; before the barrier, in each writer.
FUSED_RESNET_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma: d [64 x N] += a [64 x 16] b [N x 16]^T, issued by the four warps of a warpgroup

FUSED_RESNET_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FUSED_RESNET_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
FUSED_RESNET_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of accumulators or fragments across a fence or a wait, of which it knows nothing.
template <int kValues>
FUSED_RESNET_DEVICE void hold(float (&d)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
FUSED_RESNET_DEVICE void hold(uint32_t (&fragment)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(fragment[i])::"memory");
}

#define FUSED_RESNET_REGISTERS_32                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSED_RESNET_REGISTERS_64                                                    \
  FUSED_RESNET_REGISTERS_32                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSED_RESNET_REGISTERS_96                                                    \
  FUSED_RESNET_REGISTERS_64                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FUSED_RESNET_REGISTERS_128                                                               \
  FUSED_RESNET_REGISTERS_96                                                                      \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FUSED_RESNET_D8(i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FUSED_RESNET_D32(i) FUSED_RESNET_D8(i), FUSED_RESNET_D8(i + 8), FUSED_RESNET_D8(i + 16), FUSED_RESNET_D8(i + 24)
#define FUSED_RESNET_D_32 FUSED_RESNET_D32(0)
#define FUSED_RESNET_D_64 FUSED_RESNET_D_32, FUSED_RESNET_D32(32)
#define FUSED_RESNET_D_96 FUSED_RESNET_D_64, FUSED_RESNET_D32(64)
#define FUSED_RESNET_D_128 FUSED_RESNET_D_96, FUSED_RESNET_D32(96)

// Both operands in shared memory: described by `matrix_descriptor` (transposed 0), or by `transposed_descriptor` (1).
#define FUSED_RESNET_WGMMA(type, n, values, desc_a, desc_b, transposed)                                    \
  asm volatile(                                                                                            \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FUSED_RESNET_REGISTERS_##values \
      "}, %" #desc_a ", %" #desc_b ", p, 1, 1, " #transposed ", " #transposed ";\n}\n"                     \
      : FUSED_RESNET_D_##values                                                                            \
      : "l"(a), "l"(b))

template <DataType type>
FUSED_RESNET_DEVICE void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (type == DataType::kBFloat16) {
    FUSED_RESNET_WGMMA("bf16", 64, 32, 32, 33, 0);
  } else {
    FUSED_RESNET_WGMMA("f16", 64, 32, 32, 33, 0);
  }
}
template <DataType type>
FUSED_RESNET_DEVICE void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (type == DataType::kBFloat16) {
    FUSED_RESNET_WGMMA("bf16", 128, 64, 64, 65, 0);
  } else {
    FUSED_RESNET_WGMMA("f16", 128, 64, 64, 65, 0);
  }
}
template <DataType type>
FUSED_RESNET_DEVICE void wgmma(float (&d)[128], uint64_t a, uint64_t b) {
  if constexpr (type == DataType::kBFloat16) {
    FUSED_RESNET_WGMMA("bf16", 256, 128, 128, 129, 0);
  } else {
    FUSED_RESNET_WGMMA("f16", 256, 128, 128, 129, 0);
  }
}

template <DataType type>
FUSED_RESNET_DEVICE void wgmma_transposed(float (&d)[96], uint64_t a, uint64_t b) {
  if constexpr (type == DataType::kBFloat16) {
    FUSED_RESNET_WGMMA("bf16", 192, 96, 96, 97, 1);
  } else {
    FUSED_RESNET_WGMMA("f16", 192, 96, 96, 97, 1);
  }
}

// Operand A as a fragment in registers.
#define FUSED_RESNET_WGMMA_FRAGMENT(type)                                                        \
  asm volatile(                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FUSED_RESNET_REGISTERS_32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                           \
      : FUSED_RESNET_D_32                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <DataType type>
FUSED_RESNET_DEVICE void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (type == DataType::kBFloat16) {
    FUSED_RESNET_WGMMA_FRAGMENT("bf16");
  } else {
    FUSED_RESNET_WGMMA_FRAGMENT("f16");
  }
}

#undef FUSED_RESNET_REGISTERS_32
#undef FUSED_RESNET_REGISTERS_64
#undef FUSED_RESNET_REGISTERS_96
#undef FUSED_RESNET_REGISTERS_128
#undef FUSED_RESNET_D8
#undef FUSED_RESNET_D32
#undef FUSED_RESNET_D_32
#undef FUSED_RESNET_D_64
#undef FUSED_RESNET_D_96
#undef FUSED_RESNET_D_128
#undef FUSED_RESNET_WGMMA
#undef FUSED_RESNET_WGMMA_FRAGMENT

}  // namespace fused_resnet::hopper
