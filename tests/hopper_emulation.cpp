// C functions over the Hopper kernels' source on the emulated machine, for test_hopper.py.
#include <cstdio>

#include "hopper_machine.h"
// The kernels need the machine above.
#include "bottleneck_sm90.cuh"
#include "conv3x3_halo_sm90.cuh"
#include "conv3x3_sm90.cuh"
#include "conv3x3_wgrad_sm90.cuh"

namespace {

using namespace fused_resnet;

template <typename Kernel>
void run_blocks(const Conv3x3Arguments& a, const hopper::TensorMap (&maps)[4], int items, int sms, int seed) {
  const int grid = items < sms ? items : sms;
  for (int block = 0; block < grid; ++block) {
    hopper::machine::run_block(block, grid, hopper::kThreads, seed,
                               [&] { Kernel(a, maps[0], maps[1], maps[2], maps[3]).run(); });
  }
}

template <DataType type, Epilogue kEpilogue>
void run_conv3x3(const Conv3x3Arguments& a, int block_n, const hopper::TensorMap (&maps)[4], int sms, int seed) {
  if (block_n == 0) {
    return run_blocks<Conv3x3HaloBlock<type, kEpilogue>>(a, maps, halo_work(a.shape, a.partial_rows).items(), sms,
                                                         seed);
  }
  const int items = conv3x3_work(a.shape, block_n, a.partial_rows).items();
  if (block_n == 64) return run_blocks<Conv3x3Block<type, 64, kEpilogue>>(a, maps, items, sms, seed);
  if (block_n == 128) return run_blocks<Conv3x3Block<type, 128, kEpilogue>>(a, maps, items, sms, seed);
  if constexpr (kEpilogue == Epilogue::kAffine) {
    return run_blocks<Conv3x3Block<type, 256, kEpilogue>>(a, maps, items, sms, seed);
  }
  hopper::machine::require(false, "no such tile");
}

template <DataType type>
void run_conv3x3(const Conv3x3Arguments& a, Epilogue epilogue, int block_n, const hopper::TensorMap (&maps)[4], int sms,
                 int seed) {
  switch (epilogue) {
    case Epilogue::kStatistics:
      return run_conv3x3<type, Epilogue::kStatistics>(a, block_n, maps, sms, seed);
    case Epilogue::kReluGradient:
      return run_conv3x3<type, Epilogue::kReluGradient>(a, block_n, maps, sms, seed);
    case Epilogue::kAffine:
      return run_conv3x3<type, Epilogue::kAffine>(a, block_n, maps, sms, seed);
  }
}

template <typename Body>
int guarded(char* error, Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 256, "%s", e.what());
    return 1;
  }
}

template <DataType type, bool kProjection>
void run_bottleneck(const BottleneckArguments& a, const hopper::TensorMap (&maps)[6], int sms, int seed) {
  const int wanted = (a.shape.count() + 1) / 2, grid = wanted < sms ? wanted : sms;
  for (int block = 0; block < grid; ++block) {
    using Block = BottleneckBlock<type, kProjection>;
    hopper::machine::run_block(block, grid, hopper::kThreads, seed,
                               [&] { Block(a, maps[0], maps[1], maps[2], maps[3], maps[4], maps[5]).run(); });
  }
}

template <DataType type, int kFilters>
void run_wgrad(const WgradArguments& a, const hopper::TensorMap (&maps)[2], int seed) {
  using Block = WgradBlock<type, kFilters>;
  const int items = wgrad_work(a.shape, a.parts).items();
  for (int block = 0; block < items; ++block) {
    hopper::machine::run_block(block, items, hopper::kThreads, seed, [&] { Block(a, maps[0], maps[1]).run(); });
  }
}

template <DataType type>
void run_wgrad(const WgradArguments& a, const hopper::TensorMap (&maps)[2], int seed) {
  const int filters = wgrad_filters(a.shape.filters);
  return filters == 256   ? run_wgrad<type, 256>(a, maps, seed)
         : filters == 128 ? run_wgrad<type, 128>(a, maps, seed)
                          : run_wgrad<type, 64>(a, maps, seed);
}

Conv3x3Shape shape_of(const int* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

}  // namespace

extern "C" {

// Arithmetic, for brute force

uint32_t tile_offset(uint32_t row, uint32_t column) { return hopper::tile_offset(row, column); }
uint64_t matrix_descriptor(uint32_t address) { return hopper::matrix_descriptor(address); }
uint64_t transposed_descriptor(uint32_t address, uint32_t tile_bytes) {
  return hopper::transposed_descriptor(address, tile_bytes);
}
uint32_t accumulator_row(uint32_t thread, uint32_t i) { return hopper::accumulator_row(thread, i); }
uint32_t accumulator_column(uint32_t thread, uint32_t i) { return hopper::accumulator_column(thread, i); }
uint32_t fragment_row(uint32_t lane) { return hopper::fragment_row(lane); }
uint32_t fragment_half(uint32_t lane) { return hopper::fragment_half(lane); }
uint32_t halo(uint32_t row, uint32_t r, uint32_t s) { return halo_row(row, r, s); }
float round_trip(float value, int bfloat16) {
  return hopper::machine::to_float(hopper::machine::from_float(value, bfloat16), bfloat16);
}

// out [4]: tiles, rows, columns of the work, filters of a tile; first [rows + 1]: the first tile of each row.
void conv3x3_work(const int* shape, int epilogue, int side, int partial_rows, int sms, int* out, int* first) {
  const Conv3x3Shape s = shape_of(shape);
  out[3] = conv3x3_block_n(s, static_cast<Epilogue>(epilogue), side, partial_rows, sms);
  const Conv3x3Work work = fused_resnet::conv3x3_work(s, out[3], partial_rows);
  out[0] = work.tiles, out[1] = work.rows, out[2] = work.columns;
  for (int row = 0; row <= work.rows; ++row) first[row] = work.first_tile(row);
}

// The position that an im2col load gives to each output pixel of a tile at tap (0, 0): out [128, 3] = image, h, w.
void conv3x3_positions(const int* shape, int tile, int* out) {
  const Conv3x3Shape s = shape_of(shape);
  const LoadStart start = load_start(s, tile * kBlockM);
  hopper::machine::walk(
      conv3x3_maps(s, true, 64).x, start.w, start.h, start.image,
      [&](uint32_t pixel, int w, int h, int n) { out[3 * pixel] = n, out[3 * pixel + 1] = h, out[3 * pixel + 2] = w; });
}

// Which limit one of a launch's tensor maps breaks, null if none.
const char* conv3x3_fault(const int* shape, int block_n) {
  const Conv3x3Shape s = shape_of(shape);
  const Conv3x3Maps maps = block_n == 0 ? halo_maps(s, true) : conv3x3_maps(s, true, block_n);
  for (const auto& map : {maps.x, maps.w, maps.out}) {
    if (const char* reason = hopper::fault(map)) return reason;
  }
  return nullptr;
}
const char* bottleneck_fault(const int* shape, int projection) {
  const BottleneckMaps maps = bottleneck_maps({shape[0], shape[1], shape[2]}, true, projection);
  for (const auto& map : {maps.x, maps.w1, maps.w2, maps.w3, maps.out}) {
    if (const char* reason = hopper::fault(map)) return reason;
  }
  return nullptr;
}

// The number of tiles, and the first pixel of each: out [tiles, 3] = image, h, w; null: the number alone.
int bottleneck_tiles(const int* shape, int* out) {
  const SquareTiles s{shape[0], shape[1], shape[2]};
  for (int tile = 0; out != nullptr && tile < s.count(); ++tile) {
    const SquareTile t = s.at(tile);
    out[3 * tile] = t.image, out[3 * tile + 1] = t.h, out[3 * tile + 2] = t.w;
  }
  return s.count();
}

// What the machine says about a kernel with a fault: 0 none, 1 a thread waits for a barrier that never fills, 2 a copy
// reads a write without a fence, 3 the block ends under a copy, 4 a tile is not aligned, 5 a barrier is used before its
// initialisation is published, 6 a product reads registers without a fence after their load, 7 the warp asks for
// registers that nobody has given back.
int faulty(int fault, char* error) {
  uint8_t memory[64 * 128] = {};
  const hopper::TensorMap map{hopper::matrix_map(true, 64, 64, 64), memory};
  return guarded(error, [&] {
    hopper::machine::run_block(0, 1, 32, 0, [&] {
      if (hopper::thread_index() == 0) {
        hopper::barrier_init(8192, 1);
        if (fault != 5) hopper::barrier_init_done();
      }
      hopper::sync_block();
      for (uint32_t i = hopper::thread_index(); i < 2048; i += 32) hopper::store_shared(4 * i, 0x3f803f80);
      if (fault != 2) hopper::fence_async_proxy();
      hopper::sync_block();
      if (hopper::thread_index() == 0) {
        hopper::store_matrix(map, fault == 4 ? 128 : 0, 0, 0);
        hopper::store_commit();
        if (fault != 3) hopper::store_wait_read<0>();
      }
      if (fault == 1 || fault == 5) hopper::barrier_wait(8192, 0);
      uint32_t a[4];
      float d[32] = {};
      hopper::wgmma_fence();
      hopper::load_fragment(a, 0);
      if (fault != 6) hopper::wgmma_fence();
      hopper::wgmma<DataType::kBFloat16>(d, a, hopper::matrix_descriptor(0));
      hopper::wgmma_commit();
      hopper::wgmma_wait<0>();
      if (fault == 7) hopper::raise_registers<hopper::kConsumerRegisters>();
    });
  });
}

// Kernels. Runs the kernel as launch_conv3x3_sm90 would; block_n 0: its choice. 0, or 1 with the reason in `error`
// [256].
int conv3x3(const int* shape, int bfloat16, int epilogue, int block_n, void* x, void* w, const FrozenBatchNorm* frozen,
            const float* bn, void* side, const uint8_t* mask, void* out, float* partials, int partial_rows, int relu,
            int sms, int seed, char* error) {
  return guarded(error, [&] {
    const Conv3x3Shape s = shape_of(shape);
    const auto kind = static_cast<Epilogue>(epilogue);
    const bool halo = block_n == 0 && conv3x3_reads_halos(s);
    const int n = halo || block_n ? block_n : conv3x3_block_n(s, kind, side != nullptr, partial_rows, sms);
    const Conv3x3Maps specs = halo ? halo_maps(s, bfloat16) : conv3x3_maps(s, bfloat16, n);
    const auto bytes = [](void* p) { return static_cast<uint8_t*>(p); };
    const hopper::TensorMap maps[4] = {
        {specs.x, bytes(x)}, {specs.w, bytes(w)}, {specs.out, bytes(out)}, {specs.out, bytes(side)}};
    const Conv3x3Arguments a{s, partial_rows, *frozen, bn, partials, side != nullptr, mask, relu != 0};
    bfloat16 ? run_conv3x3<DataType::kBFloat16>(a, kind, n, maps, sms, seed)
             : run_conv3x3<DataType::kFloat16>(a, kind, n, maps, sms, seed);
  });
}

// Runs the kernel as launch_conv3x3_wgrad_sm90 would, without the sum over its parts.
int conv3x3_wgrad(const int* shape, int bfloat16, void* x, void* g, float* dw, int parts, int seed, char* error) {
  return guarded(error, [&] {
    const Conv3x3Shape s = shape_of(shape);
    const WgradMaps specs = wgrad_maps(s, bfloat16);
    const hopper::TensorMap maps[2] = {{specs.x, static_cast<uint8_t*>(x)}, {specs.g, static_cast<uint8_t*>(g)}};
    const WgradArguments a{s, parts, dw};
    bfloat16 ? run_wgrad<DataType::kBFloat16>(a, maps, seed) : run_wgrad<DataType::kFloat16>(a, maps, seed);
  });
}

// Runs the kernel as launch_bottleneck_sm90 would.
int bottleneck(const int* shape, int bfloat16, void* x, void* w1, void* w2, void* w3, void* w_shortcut,
               const FrozenBatchNorm* bns, void* out, int sms, int seed, char* error) {
  return guarded(error, [&] {
    const SquareTiles s{shape[0], shape[1], shape[2]};
    const bool projection = w_shortcut != nullptr;
    const BottleneckMaps specs = bottleneck_maps(s, bfloat16, projection);
    const auto bytes = [](void* p) { return static_cast<uint8_t*>(p); };
    const hopper::TensorMap maps[6] = {{specs.x, bytes(x)},   {specs.w1, bytes(w1)},         {specs.w2, bytes(w2)},
                                       {specs.w3, bytes(w3)}, {specs.w3, bytes(w_shortcut)}, {specs.out, bytes(out)}};
    const BottleneckArguments a{s, bns[0], bns[1], bns[2], bns[3]};
    constexpr auto kBf = DataType::kBFloat16, kHalf = DataType::kFloat16;
    if (projection) {
      bfloat16 ? run_bottleneck<kBf, true>(a, maps, sms, seed) : run_bottleneck<kHalf, true>(a, maps, sms, seed);
    } else {
      bfloat16 ? run_bottleneck<kBf, false>(a, maps, sms, seed) : run_bottleneck<kHalf, false>(a, maps, sms, seed);
    }
  });
}

}  // extern "C"
