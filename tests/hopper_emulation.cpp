// C functions over the Hopper kernels' source on the emulated machine, for test_hopper.py.
#include <cstdio>

#include "hopper_machine.h"
// The kernels need the machine above.
#include "bottleneck_sm90.cuh"
#include "conv3x3_sm90.cuh"

namespace {

using namespace fused_resnet;

template <DataType type, int kBlockN, Epilogue kEpilogue>
void run_conv3x3(const Conv3x3Arguments& a, const hopper::TensorMap (&maps)[4], int sms, int seed) {
  const int items = conv3x3_work(a.shape, kBlockN, a.partial_rows).items();
  const int grid = items < sms ? items : sms;
  for (int block = 0; block < grid; ++block) {
    using Block = Conv3x3Block<type, kBlockN, kEpilogue>;
    hopper::machine::run_block(block, grid, Block::kThreads, seed,
                               [&] { Block(a, maps[0], maps[1], maps[2], maps[3]).run(); });
  }
}

template <DataType type>
void run_conv3x3(const Conv3x3Arguments& a, Epilogue epilogue, int block_n, const hopper::TensorMap (&maps)[4], int sms,
                 int seed) {
  if (epilogue == Epilogue::kStatistics) {
    return block_n == 64 ? run_conv3x3<type, 64, Epilogue::kStatistics>(a, maps, sms, seed)
                         : run_conv3x3<type, 128, Epilogue::kStatistics>(a, maps, sms, seed);
  }
  if (epilogue == Epilogue::kReluGradient) {
    return block_n == 64 ? run_conv3x3<type, 64, Epilogue::kReluGradient>(a, maps, sms, seed)
                         : run_conv3x3<type, 128, Epilogue::kReluGradient>(a, maps, sms, seed);
  }
  return block_n == 64    ? run_conv3x3<type, 64, Epilogue::kAffine>(a, maps, sms, seed)
         : block_n == 128 ? run_conv3x3<type, 128, Epilogue::kAffine>(a, maps, sms, seed)
                          : run_conv3x3<type, 256, Epilogue::kAffine>(a, maps, sms, seed);
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

template <DataType type>
void run_bottleneck(const BottleneckArguments& a, const hopper::TensorMap (&maps)[5], int sms, int seed) {
  const int wanted = (a.shape.tiles() + 1) / 2, grid = wanted < sms ? wanted : sms;
  for (int block = 0; block < grid; ++block) {
    hopper::machine::run_block(block, grid, BottleneckBlock<type>::kThreads, seed,
                               [&] { BottleneckBlock<type>(a, maps[0], maps[1], maps[2], maps[3], maps[4]).run(); });
  }
}

Conv3x3Shape shape_of(const int* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

}  // namespace

extern "C" {

// Runs the kernel as launch_conv3x3_sm90 would; block_n 0: its choice. 0, or 1 with the reason in `error` [256].
int conv3x3(const int* shape, int bfloat16, int epilogue, int block_n, void* x, void* w, const float* bn, void* side,
            const uint8_t* mask, void* out, float* partials, int partial_rows, int relu, int sms, int seed,
            char* error) {
  return guarded(error, [&] {
    const Conv3x3Shape s = shape_of(shape);
    const auto kind = static_cast<Epilogue>(epilogue);
    const int n = block_n ? block_n : conv3x3_block_n(s, kind, side != nullptr, partial_rows, sms);
    const Conv3x3Maps specs = conv3x3_maps(s, bfloat16, n);
    const auto bytes = [](void* p) { return static_cast<uint8_t*>(p); };
    const hopper::TensorMap maps[4] = {
        {specs.x, bytes(x)}, {specs.w, bytes(w)}, {specs.out, bytes(out)}, {specs.out, bytes(side)}};
    const Conv3x3Arguments a{s, partial_rows, bn, partials, side != nullptr, mask, relu != 0};
    bfloat16 ? run_conv3x3<DataType::kBFloat16>(a, kind, n, maps, sms, seed)
             : run_conv3x3<DataType::kFloat16>(a, kind, n, maps, sms, seed);
  });
}

// Runs the kernel as launch_bottleneck_sm90 would.
int bottleneck(const int* shape, int bfloat16, void* x, void* w1, void* w2, void* w3, const float* bn1,
               const float* bn2, const float* bn3, void* out, int sms, int seed, char* error) {
  return guarded(error, [&] {
    const BottleneckShape s{shape[0], shape[1], shape[2]};
    const BottleneckMaps specs = bottleneck_maps(s, bfloat16);
    const auto bytes = [](void* p) { return static_cast<uint8_t*>(p); };
    const hopper::TensorMap maps[5] = {{specs.x, bytes(x)},
                                       {specs.w1, bytes(w1)},
                                       {specs.w2, bytes(w2)},
                                       {specs.w3, bytes(w3)},
                                       {specs.out, bytes(out)}};
    const BottleneckArguments a{s, bn1, bn2, bn3};
    bfloat16 ? run_bottleneck<DataType::kBFloat16>(a, maps, sms, seed)
             : run_bottleneck<DataType::kFloat16>(a, maps, sms, seed);
  });
}

}  // extern "C"
