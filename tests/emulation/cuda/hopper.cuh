// Stands in for csrc/cuda/hopper.cuh: the same functions, doing on the host what the PTX ISA says
// of their instructions.
//
// What is asynchronous happens as late as it may or at a random time: products when they are waited
// for, copies between any two steps of the threads. So a stage that is overwritten too early, a
// result that is stored from memory already in use, and a wait that is missing give wrong numbers.
#pragma once

#include <cuda.h>

#include <array>

#include "cuda/launch.h"
#include "numbers.h"

namespace rope_fused::cuda::hopper {

using emulation::cluster;

inline char* shared_memory() { return cluster->block().shared; }

inline uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - cluster->block().shared);
}

// The same place in block `rank` of the cluster.
template <class P>
P* in_block(P* place, uint32_t rank) {
  return reinterpret_cast<P*>(cluster->blocks[rank].shared + address_of(place));
}

inline uint32_t rank_in_cluster() { return cluster->rank(); }
inline void sync_cluster() {
  emulation::wait(cluster->all, static_cast<unsigned>(cluster->threads.size()));
}

template <int kCount>
void give_registers_down_to() {}
template <int kCount>
void take_registers_up_to() {}

// -- barriers ------------------------------------------------------------------------------------

struct Barrier {
  int16_t arrivals, pending;
  int32_t bytes : 24;  // expected and not yet copied; copies may come first
  uint32_t phase : 8;

  void init(int count) {
    arrivals = pending = static_cast<int16_t>(count);
    bytes = 0;
    phase = 0;
  }
  void arrive() { update(1, 0); }
  void arrive_at(uint32_t rank) { in_block(this, rank)->arrive(); }
  void arrive_expecting(int more) { update(1, more); }
  void wait(uint32_t parity) {
    emulation::wait_until([this, parity] { return phase % 2 != parity; });
  }
  void update(int arrived, int more) {
    pending = static_cast<int16_t>(pending - arrived);
    bytes += more;
    if (pending < 0) throw std::logic_error("more arrivals at a barrier than it waits for");
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    phase += 1;
  }
};
static_assert(sizeof(Barrier) == 8);

inline void fence_new_barriers() {}

// -- copies --------------------------------------------------------------------------------------

// f(address in a box that begins at `first`, its element of the tensor or null if there is none).
template <class F>
void for_box(const CUtensorMap& map, uint32_t first, const std::array<int, 4>& corner, const F& f) {
  if (first % 128 != 0) throw std::logic_error("a box must begin at a multiple of 128 bytes");
  uint32_t count = 1;
  for (uint32_t i = 0; i < map.rank; ++i) count *= map.box[i];
  for (uint32_t n = 0; n < count; ++n) {
    char* element = map.data;
    bool inside = true;
    for (uint32_t i = 0, left = n; i < map.rank; left /= map.box[i], ++i) {
      const int64_t at = int64_t{corner[i]} + left % map.box[i];
      inside = inside && at >= 0 && at < map.size[i];
      element += at * static_cast<int64_t>(i == 0 ? 2 : map.bytes[i - 1]);
    }
    const uint32_t address = first + 2 * n;
    const uint32_t moved = (address / 128 % map.swizzle) * 16;
    f(address ^ moved, inside ? element : nullptr);
  }
}

inline void load_into(char* to, const CUtensorMap& from, Barrier* loaded,
                      const std::array<int, 4>& corner, uint32_t rank) {
  char* shared = cluster->blocks[rank].shared;
  const uint32_t first = address_of(to);
  loaded = in_block(loaded, rank);
  cluster->copies.push_back([=, &from] {
    int bytes = 0;
    for_box(from, first, corner, [&](uint32_t address, const char* element) {
      if (element == nullptr) {
        std::memset(shared + address, 0, 2);
      } else {
        std::memcpy(shared + address, element, 2);
      }
      bytes += 2;
    });
    loaded->update(0, -bytes);
  });
}

inline void load_for_all(char* to, const CUtensorMap& from, Barrier& loaded, int column, int row,
                         uint16_t ranks) {
  for (uint32_t rank = 0; rank < cluster->blocks.size(); ++rank) {
    if (ranks >> rank & 1) load_into(to, from, &loaded, {column, row, 0, 0}, rank);
  }
}
inline void load_of_head(char* to, const CUtensorMap& from, Barrier& loaded, int column, int head) {
  load_into(to, from, &loaded, {column, 0, 0, head}, cluster->rank());
}

inline void store_box(const CUtensorMap& to, const char* from, int column, int row) {
  const char* shared = cluster->block().shared;
  const uint32_t first = address_of(from);
  emulation::Thread& thread = cluster->thread();
  ++thread.stores;
  cluster->copies.push_back([=, &to, &thread] {
    for_box(to, first, {column, row, 0, 0}, [&](uint32_t address, char* element) {
      if (element != nullptr) std::memcpy(element, shared + address, 2);
    });
    --thread.stores;
  });
}
inline void commit_stores() {}
inline void wait_for_stores() {
  emulation::Thread& thread = cluster->thread();
  emulation::wait_until([&thread] { return thread.stores == 0; });
}
inline void fence_before_stores() {}

// -- products ------------------------------------------------------------------------------------

// 16 columns of a row of an operand: K-major, in 128-byte swizzle (PTX ISA, "Matrix Descriptor
// Format" and "Strides").
template <class T>
std::array<double, 16> row_of(const char* shared, uint64_t descriptor, int row) {
  if (descriptor >> 61 != 2) throw std::logic_error("only the 128-byte swizzle is emulated");
  const auto first = static_cast<uint32_t>(descriptor & 0x3fff) * 16;
  const auto groups = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16;
  std::array<double, 16> values;
  for (int k = 0; k < 16; ++k) {
    const uint32_t address = first + row / 8 * groups + row % 8 * 128 + 2 * k;
    T value;
    std::memcpy(&value, shared + (address ^ (address / 128 % 8) * 16), 2);
    values[k] = load(value);
  }
  return values;
}

// All of these are `.sync.aligned`: a warp's threads come to them together.
inline void begin_products() { __syncwarp(); }
inline void commit_products() {
  emulation::Thread& thread = cluster->thread();
  thread.groups.push_back(std::move(thread.products));
  thread.products.clear();
}
template <int kLeft>
void wait_for_products() {
  auto& groups = cluster->thread().groups;
  for (; groups.size() > kLeft; groups.pop_front()) {
    for (const auto& product : groups.front()) product();
  }
  __syncwarp();
}
template <int kCount>
void settle(float (&)[kCount]) {}

template <class T, int kColumns>
struct Product {
  static void issue(float (&sums)[kColumns / 2], uint64_t x, uint64_t w, int add) {
    const char* shared = cluster->block().shared;
    const int thread = static_cast<int>(threadIdx.x % 128);
    cluster->thread().products.push_back([=, to = &sums[0]] {
      const int row = thread / 32 * 16 + thread % 32 / 4;
      const std::array<double, 16> rows[2] = {row_of<T>(shared, x, row),
                                              row_of<T>(shared, x, row + 8)};
      for (int i = 0; i < kColumns / 2; i += i % 4 == 1 ? 3 : 1) {
        const auto column = row_of<T>(shared, w, i / 4 * 8 + thread % 4 * 2 + i % 2);
        for (int lower = 0; lower < 2; ++lower) {
          double sum = 0;
          for (int k = 0; k < 16; ++k) sum += rows[lower][k] * column[k];
          float& total = to[i + 2 * lower];
          total = (add != 0 ? total : 0.0f) + static_cast<float>(sum);
        }
      }
    });
  }
};

}  // namespace rope_fused::cuda::hopper
