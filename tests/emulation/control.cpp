// What tests ask of the emulated runtime, beside the module's own functions.
#include "cuda/tile.cuh"
#include "cuda_runtime.h"

extern "C" __attribute__((visibility("default"))) void emulate_capture(bool on) {
  emulation::capturing = on;
}

// (row, column) of number i of a thread's fragment.
extern "C" __attribute__((visibility("default"))) void emulate_fragment(int thread, int i,
                                                                        int32_t* at) {
  at[0] = rope_fused::cuda::fragment_row(thread / 32, thread % 32, i);
  at[1] = rope_fused::cuda::fragment_column(thread % 32, i);
}
