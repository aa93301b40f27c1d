// A block of a Hopper GPU on the CPU: the functions of csrc/hopper/ptx.cuh, so that the kernels' own source runs here.
//
// Every GPU thread is a fiber. Threads run in random order, switching where they wait. What is asynchronous on the GPU
// happens at another time here: a wgmma only when its thread waits for it, a TMA copy at a random later moment, or, as
// the seed says, a load at once or only when nothing else can go on, like then every store and the threads of one warp.
// They read what shared memory and registers hold at that time. So a kernel that reuses a buffer or a register too
// early, reads a tile before its barrier, or waits for a phase that never ends, gives a wrong result or an error.
// Shared memory starts as NaN. Reported as errors: deadlocks, also of warpgroups that ask for more registers than the
// block has; ordinary writes that TMA or wgmma reads without a proxy fence, barriers that other threads or TMA use
// before their initialisation is published, products that no wgmma.fence separates from the wait or the ldmatrix before
// them; descriptors and copies whose alignment or fields the hardware would not take; blocks that end under a running
// store.
//
// What it takes from the documentation and cannot check: the meaning of the instructions, tensor maps and descriptors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "hopper/layout.h"
#include "hopper/tensor_map.h"

#define FUSED_RESNET_DEVICE inline

namespace fused_resnet::hopper {

struct TensorMap {
  TensorMapSpec spec;
  uint8_t* data;
};

namespace machine {

inline float to_float(uint16_t bits, bool bfloat16) {
  uint32_t word;
  if (bfloat16) {
    word = static_cast<uint32_t>(bits) << 16;
  } else {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 0) return std::ldexp(static_cast<float>(fraction), -24) * (sign ? -1.0f : 1.0f);
    word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// Rounds to nearest even: the kept bits, with the rest added as a fraction.
inline uint16_t from_float(float value, bool bfloat16) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (std::isnan(value)) return bfloat16 ? 0x7fff : 0x7fff;
  if (bfloat16) return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  const uint16_t sign = word >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  word &= 0x7fffffff;
  return sign | static_cast<uint16_t>((word + 0xfff + (word >> 13 & 1) - (112u << 23)) >> 13);
}

struct Barrier {
  uint32_t arrivals, pending;
  int64_t bytes;
  uint32_t phase;
  bool published;  // the fence that shows its initialisation to other threads and to TMA has been passed
};

struct Product {  // a wgmma that has been issued
  float* d;
  int columns;
  uint64_t desc_a;
  const uint32_t* fragment;  // or null
  bool transposed;
  uint64_t desc_b;
  bool bfloat16;
  int group;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::function<bool()> ready;  // empty: can run
  uint32_t registers = kLaunchRegisters;
  bool fenced = false;  // wgmma may read the registers
  std::vector<Product> products;
  int product_groups = 0;           // committed
  int store_groups = 0;             // committed
  int stores_read = 0;              // groups of which the thread knows that they have read shared memory
  std::vector<int> running_stores;  // groups
  std::vector<uint32_t> unfenced;   // words of shared memory
  const void* posted = nullptr;     // to the other lanes
};

struct Meeting {
  uint32_t arrived = 0, generation = 0;
};

struct Block {
  uint32_t index, grid, threads_count;
  std::vector<uint8_t> shared;
  std::vector<uint16_t> writer;  // of each word: 1 + thread of an unfenced ordinary write
  std::vector<Thread> threads;
  std::map<uint32_t, Barrier> barriers;
  std::map<uint32_t, Meeting> meetings;
  uint32_t spare_registers = 0;
  std::vector<std::function<void()>> copies;  // that run
  uint32_t order;                             // 0 random; else stores and one warp last, loads 1 at once, 2 last
  uint32_t slow_warp;
  std::mt19937 random;
  ucontext_t scheduler;
  uint32_t current = 0;
  std::string error;
};

inline Block* block = nullptr;
inline std::function<void()> entry;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

inline Thread& self() { return block->threads[block->current]; }

inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  self().ready = std::move(ready);
  swapcontext(&self().context, &block->scheduler);
}

inline void fiber() {
  try {
    entry();
    require(self().stores_read == self().store_groups, "a thread ends without waiting for its stores");
  } catch (const std::exception& error) {
    block->error = std::string(error.what()) + " (thread " + std::to_string(block->current) + ")";
  }
  self().done = true;
  swapcontext(&self().context, &block->scheduler);
}

inline void start_copy(bool load, std::function<void()> copy) {
  if (load && block->order == 1) return copy();
  block->copies.push_back(std::move(copy));
}

inline void run_copy() {
  const size_t i = block->random() % block->copies.size();
  const auto copy = std::move(block->copies[i]);
  block->copies.erase(block->copies.begin() + i);
  copy();
}

// Runs `body` as one block; throws std::runtime_error for what a GPU would hang on, refuse or get wrong.
inline void run_block(uint32_t index, uint32_t grid, uint32_t threads, uint32_t seed, std::function<void()> body) {
  Block b;
  b.index = index, b.grid = grid, b.threads_count = threads;
  b.random.seed(seed * 7919 + index);
  b.order = seed % 3;
  b.slow_warp = b.random() % (threads / 32);
  b.shared.resize(kSharedLimit);
  for (size_t i = 0; i < b.shared.size(); i += 2) b.shared[i] = 0xc1, b.shared[i + 1] = 0x7f;
  b.writer.resize(kSharedLimit / 4);
  b.threads.resize(threads);
  block = &b;
  entry = std::move(body);
  constexpr size_t kStack = 128 * 1024;
  for (Thread& t : b.threads) {
    t.stack.reset(new char[kStack]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber, 0);
  }
  bool running = true, progress = true;
  while (running) {
    running = false;
    const bool wait_for_slow = !progress;
    progress = false;
    const uint32_t start = b.random() % threads;
    for (uint32_t i = 0; i < threads; ++i) {
      const uint32_t thread = (start + i) % threads;
      Thread& t = b.threads[thread];
      if (t.done) continue;
      running = true;
      if (b.order != 0 && thread / 32 == b.slow_warp && !wait_for_slow) continue;
      if (t.ready && !t.ready()) continue;
      progress = true;
      if (b.random() % 4 == 0) continue;  // later
      t.ready = nullptr;
      b.current = thread;
      swapcontext(&b.scheduler, &t.context);
      if (!b.error.empty()) throw std::runtime_error(b.error);
      if (!b.copies.empty() && b.order == 0 && b.random() % 1024 == 0) run_copy();
    }
    if (!running) break;
    if (!b.copies.empty() && (!progress || (b.order == 0 && b.random() % 64 == 0))) {
      run_copy();
    } else {
      require(progress || !wait_for_slow, "deadlock: every thread waits");
    }
  }
  require(b.copies.empty(), "the block ended under a running copy");
  for (const auto& [address, barrier] : b.barriers) require(barrier.bytes == 0, "bytes are still announced");
}

inline uint16_t& shared_value(uint32_t address) {
  require(address % 2 == 0 && address + 2 <= kSharedLimit, "outside of shared memory");
  return *reinterpret_cast<uint16_t*>(&block->shared[address]);
}
inline uint16_t asynchronous_read(uint32_t address) {
  const uint16_t value = shared_value(address);
  require(block->writer[address / 4] == 0, "TMA or wgmma reads an ordinary write without a proxy fence");
  return value;
}

// The lanes of a warp meet.
inline void meet(uint32_t key, uint32_t count) {
  Meeting& m = block->meetings[key];
  const uint32_t generation = m.generation;
  if (++m.arrived == count) {
    m.arrived = 0;
    ++m.generation;
    return;
  }
  wait_until([&m, generation] { return m.generation != generation; });
}
inline void meet_warp() { meet(1000 + block->current / 32, 32); }
// What lane `lane` of this warp posted; between two meetings.
template <typename T>
const T& posted(uint32_t lane) {
  return *static_cast<const T*>(block->threads[block->current / 32 * 32 + lane].posted);
}

inline Barrier& barrier_at(uint32_t address) {
  const auto found = block->barriers.find(address);
  require(found != block->barriers.end(), "not a barrier");
  require(found->second.published, "mbarrier: used before its initialisation is published");
  return found->second;
}
inline void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.pending = b.arrivals;
    b.phase ^= 1;
  }
}
inline void complete(uint32_t barrier, int64_t bytes) {
  Barrier& b = barrier_at(barrier);
  b.bytes -= bytes;
  settle(b);
}

// Registers may have been read or written since the last wait or ldmatrix: a fence has to come between.
inline void issue(const Product& product) {
  require(self().fenced, "wgmma without a wgmma.fence since its registers were last in use");
  self().products.push_back(product);
}

inline uint32_t physical(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// Row r and depth k of an operand of wgmma; transposed: column r of rows of the depth.
inline float operand(uint64_t descriptor, uint32_t row, uint32_t k, bool bfloat16, bool transposed) {
  require(descriptor >> 62 == 1, "descriptor: not the 128-byte swizzle");
  require((descriptor >> 49 & 7) == 0 && (descriptor & 0xc000) == 0, "descriptor: base offset or stray bits");
  const uint32_t start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  if (transposed) {
    const uint32_t beside = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t offset = row / 64 * beside + k / 8 * group + k % 8 * 128 + row % 64 * 2;
    return to_float(asynchronous_read(physical(start + offset)), bfloat16);
  }
  return to_float(asynchronous_read(physical(start + row / 8 * group + row % 8 * 128 + k * 2)), bfloat16);
}

inline void multiply(const Product& p, uint32_t thread, int index) {
  float a[2][16];
  for (uint32_t half = 0; half < 2; ++half) {
    for (uint32_t k = 0; k < 16; ++k) {
      if (p.fragment == nullptr) {
        a[half][k] = operand(p.desc_a, accumulator_row(thread, 2 * half), k, p.bfloat16, p.transposed);
      } else {
        const Thread& owner = block->threads[thread / 4 * 4 + k % 8 / 2];
        const uint32_t word = owner.products[index].fragment[k / 8 * 2 + half];
        a[half][k] = to_float(k % 2 ? word >> 16 : word & 0xffff, p.bfloat16);
      }
    }
  }
  for (int i = 0; i < p.columns / 2; ++i) {
    if (i % 4 >= 2) continue;
    float b[16];
    for (uint32_t k = 0; k < 16; ++k)
      b[k] = operand(p.desc_b, accumulator_column(thread, i), k, p.bfloat16, p.transposed);
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t k = 0; k < 16; ++k) p.d[i + 2 * half] += a[half][k] * b[k];
    }
  }
}

inline void copy_done(uint32_t thread, int group) {
  auto& running = block->threads[thread].running_stores;
  for (size_t i = 0; i < running.size(); ++i) {
    if (running[i] == group) return static_cast<void>(running.erase(running.begin() + i));
  }
}

// Copies one 128-byte row between shared memory and the tensor; outside of the tensor: zero, or nothing.
inline void copy_row(const TensorMap& map, uint32_t shared, bool store, int64_t c, int64_t w, int64_t h, int64_t n) {
  const auto& extent = map.spec.extent;
  const auto inside = [](int64_t at, uint64_t size) { return at >= 0 && at < static_cast<int64_t>(size); };
  for (uint32_t i = 0; i < kRowValues; ++i) {
    const uint32_t address = physical(shared + 2 * i);
    const bool valid = inside(c + i, extent[0]) && inside(w, extent[1]) && inside(h, extent[2]) && inside(n, extent[3]);
    uint16_t* value =
        reinterpret_cast<uint16_t*>(map.data) + (valid ? ((n * extent[2] + h) * extent[1] + w) * extent[0] + c + i : 0);
    if (store) {
      const uint16_t read = asynchronous_read(address);
      if (valid) *value = read;
    } else {
      shared_value(address) = valid ? *value : 0;
    }
  }
}

// The positions of an im2col load, in order: along width, then height, then images, in steps within the box.
template <typename Visit>
void walk(const TensorMapSpec& spec, int w, int h, int n, Visit visit) {
  const int step = static_cast<int>(spec.step);
  for (uint32_t pixel = 0; pixel < spec.pixels; ++pixel) {
    visit(pixel, w, h, n);
    w += step;
    if (w > static_cast<int>(spec.extent[1]) - 1 + spec.upper) w = spec.lower, h += step;
    if (h > static_cast<int>(spec.extent[2]) - 1 + spec.upper) h = spec.lower, ++n;
  }
}

inline void check_map(const TensorMap& map, uint32_t shared, bool im2col) {
  require(fault(map.spec) == nullptr, "tensor map breaks a limit");
  require(map.spec.im2col == im2col, "tensor map of the other kind");
  require(shared % kTileAlignment == 0, "tile not aligned");
  require(reinterpret_cast<uintptr_t>(map.data) % 16 == 0, "tensor map: address not aligned");
}

inline void tiled(const TensorMap& map, uint32_t shared, bool store, int c, int w, int h, int n) {
  const auto& box = map.spec.box;
  uint32_t row = 0;
  for (uint32_t in = 0; in < box[3]; ++in) {
    for (uint32_t ih = 0; ih < box[2]; ++ih) {
      for (uint32_t iw = 0; iw < box[1]; ++iw) {
        copy_row(map, shared + 128 * row++, store, c, int64_t{w} + iw, int64_t{h} + ih, int64_t{n} + in);
      }
    }
  }
}

inline void load_tiled(uint32_t to, const TensorMap& map, uint32_t barrier, int c, int w, int h, int n) {
  check_map(map, to, false);
  const auto& box = map.spec.box;
  start_copy(true, [=, map = &map] {
    tiled(*map, to, false, c, w, h, n);
    complete(barrier, int64_t{128} * box[1] * box[2] * box[3]);
  });
}

inline void store_tiled(const TensorMap& map, uint32_t from, int c, int w, int h, int n) {
  check_map(map, from, false);
  const uint32_t thread = block->current;
  const int group = self().store_groups;
  self().running_stores.push_back(group);
  start_copy(false, [=, map = &map] {
    tiled(*map, from, true, c, w, h, n);
    copy_done(thread, group);
  });
}

}  // namespace machine

inline uint32_t thread_index() { return machine::block->current; }
inline int block_index() { return static_cast<int>(machine::block->index); }
inline int grid_size() { return static_cast<int>(machine::block->grid); }
inline uint32_t shared_base() { return 0; }

inline void store_shared(uint32_t address, uint32_t value) {
  machine::require(address % 4 == 0 && address + 4 <= kSharedLimit, "outside of shared memory");
  std::memcpy(&machine::block->shared[address], &value, 4);
  machine::block->writer[address / 4] = static_cast<uint16_t>(machine::block->current + 1);
  machine::self().unfenced.push_back(address / 4);
}
inline uint32_t load_shared(uint32_t address) {
  machine::require(address % 4 == 0 && address + 4 <= kSharedLimit, "outside of shared memory");
  uint32_t value;
  std::memcpy(&value, &machine::block->shared[address], 4);
  return value;
}
inline void store_shared_float(uint32_t address, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  store_shared(address, word);
}
inline float load_shared_float(uint32_t address) {
  const uint32_t word = load_shared(address);
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline void load_shared_pair(float (&pair)[2], uint32_t address) {
  machine::require(address % 8 == 0, "pair not aligned");
  for (uint32_t i = 0; i < 2; ++i) pair[i] = load_shared_float(address + 4 * i);
}
inline void load_fragment(uint32_t (&a)[4], uint32_t address) {
  machine::self().posted = &address;
  machine::self().fenced = false;
  machine::meet_warp();
  const uint32_t lane = machine::block->current % 32;
  for (uint32_t matrix = 0; matrix < 4; ++matrix) {
    const uint32_t row = machine::posted<uint32_t>(matrix * 8 + lane / 4);
    machine::require(row % 16 == 0, "ldmatrix: row not aligned");
    a[matrix] = load_shared(row + lane % 4 * 4);
  }
  machine::meet_warp();
}

template <DataType type>
inline uint32_t pack(float first, float second) {
  constexpr bool kBf = type == DataType::kBFloat16;
  return machine::from_float(first, kBf) | static_cast<uint32_t>(machine::from_float(second, kBf)) << 16;
}
template <DataType type>
inline void unpack(uint32_t word, float& first, float& second) {
  first = machine::to_float(word & 0xffff, type == DataType::kBFloat16);
  second = machine::to_float(word >> 16, type == DataType::kBFloat16);
}

inline float shuffle_xor(float value, int lanes) {
  machine::self().posted = &value;
  machine::meet_warp();
  const float other = machine::posted<float>(machine::block->current % 32 ^ lanes);
  machine::meet_warp();
  return other;
}
inline void sync_threads(uint32_t id, uint32_t threads) {
  machine::require(id >= 1 && id < 16 && threads % 32 == 0, "bar.sync: id or threads");
  machine::meet(id, threads);
}
inline void sync_warp() { machine::meet_warp(); }
inline void sync_block() { machine::meet(0, machine::block->threads_count); }
template <uint32_t kRegisters>
inline void raise_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  const uint32_t more = kRegisters - machine::self().registers;
  machine::wait_until([more] { return machine::block->spare_registers >= more; });
  machine::block->spare_registers -= more;
  machine::self().registers = kRegisters;
}
template <uint32_t kRegisters>
inline void lower_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  machine::block->spare_registers += machine::self().registers - kRegisters;
  machine::self().registers = kRegisters;
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  machine::require(barrier % 8 == 0 && barrier + 8 <= kSharedLimit, "mbarrier not aligned");
  machine::block->barriers[barrier] = {arrivals, arrivals, 0, 0, false};
}
inline void barrier_init_done() {
  for (auto& [address, barrier] : machine::block->barriers) barrier.published = true;
}
inline void barrier_arrive(uint32_t barrier) {
  machine::Barrier& b = machine::barrier_at(barrier);
  machine::require(b.pending > 0, "mbarrier: more arrivals than announced");
  --b.pending;
  machine::settle(b);
}
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  machine::Barrier& b = machine::barrier_at(barrier);
  b.bytes += bytes;
  machine::require(b.bytes < 1 << 20, "mbarrier: more bytes announced than it can count");
  barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  machine::Barrier* b = &machine::barrier_at(barrier);
  machine::wait_until([b, parity] { return b->phase != parity; });
}

inline void load_matrix(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row) {
  machine::require(map.spec.rank == 2, "tensor map of another rank");
  machine::load_tiled(to, map, barrier, column, row, 0, 0);
}
inline void load_image(uint32_t to, const TensorMap& map, uint32_t barrier, int c, int w, int h, int n) {
  machine::require(map.spec.rank == 4, "tensor map of another rank");
  machine::load_tiled(to, map, barrier, c, w, h, n);
}
inline void load_convolution(uint32_t to, const TensorMap& map, uint32_t barrier, int c, int w, int h, int n,
                             uint16_t tap_w, uint16_t tap_h) {
  machine::check_map(map, to, true);
  const auto& s = map.spec;
  const auto start_inside = [&s](int at, uint64_t extent) {
    return at >= s.lower && at <= static_cast<int>(extent) - 1 + s.upper;
  };
  machine::require(start_inside(w, s.extent[1]) && start_inside(h, s.extent[2]), "im2col: start outside of the box");
  machine::start_copy(true, [=, map = &map] {
    machine::walk(map->spec, w, h, n, [&](uint32_t pixel, int w, int h, int n) {
      machine::copy_row(*map, to + 128 * pixel, false, c, int64_t{w} + tap_w, int64_t{h} + tap_h, n);
    });
    machine::complete(barrier, int64_t{128} * map->spec.pixels);
  });
}
inline void store_matrix(const TensorMap& map, uint32_t from, int column, int row) {
  machine::require(map.spec.rank == 2, "tensor map of another rank");
  machine::store_tiled(map, from, column, row, 0, 0);
}
inline void store_image(const TensorMap& map, uint32_t from, int c, int w, int h, int n) {
  machine::require(map.spec.rank == 4, "tensor map of another rank");
  machine::store_tiled(map, from, c, w, h, n);
}
inline void store_commit() { ++machine::self().store_groups; }
template <int kPending>
inline void store_wait_read() {
  machine::Thread* t = &machine::self();
  machine::wait_until([t] {
    for (const int group : t->running_stores) {
      if (group < t->store_groups - kPending) return false;
    }
    return true;
  });
  t->stores_read = std::max(t->stores_read, t->store_groups - kPending);
}
inline void fence_async_proxy() {
  machine::Thread& t = machine::self();
  for (const uint32_t word : t.unfenced) {
    auto& writer = machine::block->writer[word];
    if (writer == machine::block->current + 1) writer = 0;
  }
  t.unfenced.clear();
}

inline void wgmma_fence() { machine::self().fenced = true; }
inline void wgmma_commit() { ++machine::self().product_groups; }
template <int kPending>
inline void wgmma_wait() {
  machine::Thread& t = machine::self();
  machine::meet_warp();
  size_t count = 0;
  while (count < t.products.size() && t.products[count].group < t.product_groups - kPending) {
    machine::multiply(t.products[count], machine::block->current, static_cast<int>(count));
    ++count;
  }
  machine::meet_warp();
  t.products.erase(t.products.begin(), t.products.begin() + count);
  t.fenced = false;
  machine::meet_warp();
}
template <int kValues>
inline void hold(float (&)[kValues]) {}
inline void hold(uint32_t (&)[4]) {}
template <DataType type, int kValues>
inline void wgmma(float (&d)[kValues], uint64_t a, uint64_t b) {
  machine::issue({d, 2 * kValues, a, nullptr, false, b, type == DataType::kBFloat16, machine::self().product_groups});
}
template <DataType type>
inline void wgmma_transposed(float (&d)[96], uint64_t a, uint64_t b) {
  machine::issue({d, 192, a, nullptr, true, b, type == DataType::kBFloat16, machine::self().product_groups});
}
template <DataType type>
inline void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  machine::issue({d, 64, 0, a, false, b, type == DataType::kBFloat16, machine::self().product_groups});
}

}  // namespace fused_resnet::hopper
