// One instruction set's kernels. The build compiles this file once per instruction set, with its
// flags and with ROPE_FUSED_ISA naming the namespace, so that one binary serves them all
// (cpu/dispatch.cpp chooses).
#include "cpu/kernels.h"

#include "cpu/backward.h"
#include "cpu/forward.h"

#define ROPE_FUSED_TEXT_(x) #x
#define ROPE_FUSED_TEXT(x) ROPE_FUSED_TEXT_(x)

namespace ROPE_FUSED_ISA {
extern const rope_fused::Kernels table;
const rope_fused::Kernels table = {ROPE_FUSED_TEXT(ROPE_FUSED_ISA), rotate_rows, rotate_backward,
                                   rotate_tables};
}  // namespace ROPE_FUSED_ISA
