// Part of libcce_ops.so: the library carries its own facts, because it may be loaded without the _C of its build (by
// another Python, or through CCE_OPS_LIBRARY). cce_ext/info.py reads them through ctypes.
#include "build_facts.h"

extern "C" __attribute__((visibility("default"))) const char* cce_build_facts() {
  return kBuildFacts;
}
