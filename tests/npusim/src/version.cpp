#include "version.h"

// Fact 1.6a: what tells the version before the library is opened.
extern "C" __attribute__((visibility("default"), used)) const char npusim_banner[] =
    "RKLLM SDK (version: " NPUSIM_VERSION " | target: Linux | build: npusim 2026-01-01)";

namespace npusim {

const int abi = NPUSIM_ABI;
const char *const version = NPUSIM_VERSION;

}  // namespace npusim
