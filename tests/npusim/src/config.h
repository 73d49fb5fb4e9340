// What the environment says: times, switches and faults. Every NPUSIM_ variable is described in
// tests/npusim/README.md.
#pragma once

#include <string>

namespace npusim {

// Returns a variable of the environment, or the default.
std::string setting(const char *name, const char *otherwise);
double number(const char *name, double otherwise);
// Whether a switch has the value.
bool is(const char *name, const char *value, const char *otherwise);

// Does the fault that is due at a place, if any: "segv" and "hang" do not return. Any other kind
// is returned, an empty string where nothing is due. See faults.cpp.
std::string fault(const std::string &place, long tokens = 0);

// Times, in milliseconds. Defaults: Qwen3-VL-2B on RK3588 (fact sheet 6.1), divided by ten.
double load_ms();
double prefill_ms_per_token();
double decode_ms_per_token();

}  // namespace npusim
