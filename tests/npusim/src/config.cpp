#include "config.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>

namespace npusim {

std::string setting(const char *name, const char *otherwise) {
    const char *value = std::getenv(name);
    return value != nullptr && *value != '\0' ? value : otherwise;
}

double number(const char *name, double otherwise) {
    const char *value = std::getenv(name);
    return value != nullptr && *value != '\0' ? std::atof(value) : otherwise;
}

bool is(const char *name, const char *value, const char *otherwise) {
    return setting(name, otherwise) == value;
}

bool older(const std::string &a, const std::string &b) {
    int left[3] = {}, right[3] = {};
    std::sscanf(a.c_str(), "%d.%d.%d", &left[0], &left[1], &left[2]);
    std::sscanf(b.c_str(), "%d.%d.%d", &right[0], &right[1], &right[2]);
    return std::lexicographical_compare(left, left + 3, right, right + 3);
}

void die(int signal) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    std::abort();
}

// Fact 2.1f: a load takes 3 to 13 s.
double load_ms() { return number("NPUSIM_LOAD_MS", 300.0); }
// Fact 6.1a: 196 tokens in 649 ms.
double prefill_ms_per_token() { return number("NPUSIM_PREFILL_MS", 0.331); }
// Fact 6.1a: 14.91 tokens per second.
double decode_ms_per_token() { return number("NPUSIM_DECODE_MS", 6.71); }

}  // namespace npusim
