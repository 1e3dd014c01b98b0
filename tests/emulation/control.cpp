// What tests ask of the emulated runtime, beside the module's own functions.
#include "cuda_runtime.h"

extern "C" __attribute__((visibility("default"))) void emulate_capture(bool on) {
  emulation::capturing = on;
}
