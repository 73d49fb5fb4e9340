#include "config.h"

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

// Fact sheet 2.1: a load takes 3 to 13 s.
double load_ms() { return number("NPUSIM_LOAD_MS", 300.0); }
// Fact sheet 6.1: 196 tokens in 649 ms.
double prefill_ms_per_token() { return number("NPUSIM_PREFILL_MS", 0.331); }
// Fact sheet 6.1: 14.91 tokens per second.
double decode_ms_per_token() { return number("NPUSIM_DECODE_MS", 6.71); }

}  // namespace npusim
