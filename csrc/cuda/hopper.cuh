// The instructions of sm_90a that the projection needs, one function each: barriers that count
// bytes, tiles copied by the TMA unit, matrix products of a warpgroup. Names and operands are those
// of the PTX ISA 8.x; shared memory is meant by 32-bit addresses.
#pragma once

#include <cuda.h>

#include "cuda/launch.h"
#include "numbers.h"

namespace rope_fused::cuda::hopper {

// All of the block's shared memory, from a multiple of 1024 bytes on, which is where the pattern of
// a 128-byte swizzle begins.
ROPE_FUSED_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

ROPE_FUSED_DEVICE uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// -- clusters ------------------------------------------------------------------------------------

ROPE_FUSED_DEVICE uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster, and what each has written.
ROPE_FUSED_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// -- registers -----------------------------------------------------------------------------------

template <int kCount>
ROPE_FUSED_DEVICE void give_registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
ROPE_FUSED_DEVICE void take_registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// -- barriers ------------------------------------------------------------------------------------

struct Barrier {
  uint64_t bits;

  ROPE_FUSED_DEVICE void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(this)), "r"(arrivals));
  }
  ROPE_FUSED_DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(this)) : "memory");
  }
  // At the barrier in the same place of block `rank` of the cluster.
  ROPE_FUSED_DEVICE void arrive_at(uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(address_of(this)),
        "r"(rank)
        : "memory");
  }
  // Arrive, and let the phase end only when as many bytes have been copied.
  ROPE_FUSED_DEVICE void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(this)),
                 "r"(bytes)
                 : "memory");
  }
  // Until a phase of this parity has ended; of a new barrier, one of parity 1 has.
  ROPE_FUSED_DEVICE void wait(uint32_t parity) {
    uint32_t ended = 0;
    while (ended == 0) {
      asm volatile(
          "{\n.reg .pred ended;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
          "selp.u32 %0, 1, 0, ended;\n}"
          : "=r"(ended)
          : "r"(address_of(this)), "r"(parity)
          : "memory");
    }
  }
};

// Makes new barriers visible to the cluster and the TMA unit.
ROPE_FUSED_DEVICE void fence_new_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// -- copies --------------------------------------------------------------------------------------

// A box of a matrix into the same place of the blocks in `ranks`, one bit each.
ROPE_FUSED_DEVICE void load_for_all(char* to, const CUtensorMap& from, Barrier& loaded, int column,
                                    int row, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(address_of(to)),
      "l"(&from), "r"(address_of(&loaded)), "r"(column), "r"(row), "h"(ranks)
      : "memory");
}

// A box at {column, 0, 0, head} of a tensor of four dimensions.
ROPE_FUSED_DEVICE void load_of_head(char* to, const CUtensorMap& from, Barrier& loaded, int column,
                                    int head) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %4, %5}], [%2];" ::"r"(address_of(to)),
      "l"(&from), "r"(address_of(&loaded)), "r"(column), "r"(0), "r"(head)
      : "memory");
}

ROPE_FUSED_DEVICE void store_box(const CUtensorMap& to, const char* from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&to),
      "r"(address_of(from)), "r"(column), "r"(row)
      : "memory");
}
ROPE_FUSED_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the shared memory of this thread's stores has been read.
ROPE_FUSED_DEVICE void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Lets the TMA unit see what this thread has written to shared memory.
ROPE_FUSED_DEVICE void fence_before_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- products ------------------------------------------------------------------------------------

ROPE_FUSED_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ROPE_FUSED_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last kLeft groups are done.
template <int kLeft>
ROPE_FUSED_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps what reads or writes `sums` on its side of a wait.
template <int kCount>
ROPE_FUSED_DEVICE void settle(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums = x w^T (+ sums, if add), x of 64 rows and w of kColumns, both 16 deep; `sums` is this
// thread's fragment.
template <class T, int kColumns>
struct Product;

// "%t0,%t1,..": the operands of an asm statement whose numbers begin with the digits t.
#define ROPE_FUSED_TO_3(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3"
#define ROPE_FUSED_TO_5(t) ROPE_FUSED_TO_3(t) ",%" #t "4,%" #t "5"
#define ROPE_FUSED_TO_7(t) ROPE_FUSED_TO_5(t) ",%" #t "6,%" #t "7"
#define ROPE_FUSED_TO_9(t) ROPE_FUSED_TO_7(t) ",%" #t "8,%" #t "9"
#define ROPE_FUSED_IN_40 \
  ROPE_FUSED_TO_9() "," ROPE_FUSED_TO_9(1) "," ROPE_FUSED_TO_9(2) "," ROPE_FUSED_TO_9(3)
#define ROPE_FUSED_IN_60 ROPE_FUSED_IN_40 "," ROPE_FUSED_TO_9(4) "," ROPE_FUSED_TO_9(5)
#define ROPE_FUSED_IN_90 \
  ROPE_FUSED_IN_60 "," ROPE_FUSED_TO_9(6) "," ROPE_FUSED_TO_9(7) "," ROPE_FUSED_TO_9(8)
#define ROPE_FUSED_IN_120 \
  ROPE_FUSED_IN_90 "," ROPE_FUSED_TO_9(9) "," ROPE_FUSED_TO_9(10) "," ROPE_FUSED_TO_9(11)
#define ROPE_FUSED_IN_48 ROPE_FUSED_IN_40 "," ROPE_FUSED_TO_7(4)
#define ROPE_FUSED_IN_64 ROPE_FUSED_IN_60 "," ROPE_FUSED_TO_3(6)
#define ROPE_FUSED_IN_96 ROPE_FUSED_IN_90 "," ROPE_FUSED_TO_5(9)
#define ROPE_FUSED_IN_128 ROPE_FUSED_IN_120 "," ROPE_FUSED_TO_7(12)

#define ROPE_FUSED_OUT_8(i)                                                                  \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define ROPE_FUSED_OUT_40                                                               \
  ROPE_FUSED_OUT_8(0), ROPE_FUSED_OUT_8(8), ROPE_FUSED_OUT_8(16), ROPE_FUSED_OUT_8(24), \
      ROPE_FUSED_OUT_8(32)
#define ROPE_FUSED_OUT_48 ROPE_FUSED_OUT_40, ROPE_FUSED_OUT_8(40)
#define ROPE_FUSED_OUT_64 ROPE_FUSED_OUT_48, ROPE_FUSED_OUT_8(48), ROPE_FUSED_OUT_8(56)
#define ROPE_FUSED_OUT_96                                                              \
  ROPE_FUSED_OUT_64, ROPE_FUSED_OUT_8(64), ROPE_FUSED_OUT_8(72), ROPE_FUSED_OUT_8(80), \
      ROPE_FUSED_OUT_8(88)
#define ROPE_FUSED_OUT_128                                                               \
  ROPE_FUSED_OUT_96, ROPE_FUSED_OUT_8(96), ROPE_FUSED_OUT_8(104), ROPE_FUSED_OUT_8(112), \
      ROPE_FUSED_OUT_8(120)

// x, w and add are the three operands behind the sums: %N, %N+1 and %N+2.
#define ROPE_FUSED_PRODUCT(T, kind, columns, count, x_at, w_at, add_at)                          \
  template <>                                                                                    \
  struct Product<T, columns> {                                                                   \
    ROPE_FUSED_DEVICE static void issue(float (&sums)[count], uint64_t x, uint64_t w, int add) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_at                                \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." kind "." kind         \
                   " {" ROPE_FUSED_IN_##count "}, " x_at ", " w_at ", add, 1, 1, 0, 0;\n}"       \
                   : ROPE_FUSED_OUT_##count                                                      \
                   : "l"(x), "l"(w), "r"(add));                                                  \
    }                                                                                            \
  }
#define ROPE_FUSED_PRODUCTS(columns, count, x_at, w_at, add_at)             \
  ROPE_FUSED_PRODUCT(BFloat16, "bf16", columns, count, x_at, w_at, add_at); \
  ROPE_FUSED_PRODUCT(Float16, "f16", columns, count, x_at, w_at, add_at)
ROPE_FUSED_PRODUCTS(80, 40, "%40", "%41", "%42");
ROPE_FUSED_PRODUCTS(96, 48, "%48", "%49", "%50");
ROPE_FUSED_PRODUCTS(128, 64, "%64", "%65", "%66");
ROPE_FUSED_PRODUCTS(192, 96, "%96", "%97", "%98");
ROPE_FUSED_PRODUCTS(256, 128, "%128", "%129", "%130");

}  // namespace rope_fused::cuda::hopper
