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

// Whether version a, such as "0.9.8", comes before b.
bool older(const std::string &a, const std::string &b);
// Ends the process with a signal, whatever was installed for it.
[[noreturn]] void die(int signal);

// Does the fault that is due at a place, if any: a signal ("segv", "bus", "ill",
// "abrt") and "hang" do not return. Any other kind
// is returned, an empty string where nothing is due. See faults.cpp.
std::string fault(const std::string &place, long tokens = 0);

// Times, in milliseconds. Defaults: Qwen3-VL-2B on RK3588 (fact 6.1a), divided by ten.
double load_ms();
double prefill_ms_per_token();
double decode_ms_per_token();

}  // namespace npusim
