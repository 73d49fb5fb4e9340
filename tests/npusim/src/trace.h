// The event trace, what the library prints, and the loud end of a caller that is wrong.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

namespace npusim {

// A value of a trace line: text, number, or JSON as it is.
struct Value {
    std::string json;
    Value(const std::string &text);
    Value(const char *text);
    Value(double number);
    Value(int number);
    Value(long number);
    Value(unsigned long number);
    Value(unsigned number);
    Value(bool value);
    static Value raw(std::string json);

  private:
    Value() = default;
};

using Fields = std::initializer_list<std::pair<const char *, Value>>;

// Nanoseconds of the monotonic clock.
long now();
// Waits until that time.
void sleep_until(long nanoseconds);

// Appends one JSON object as a line to NPUSIM_TRACE, at once and whole.
void trace(const char *event, Fields fields);

// Prints a line as the library does.
void log(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Says what the caller did wrong and which section forbids it, and aborts the process.
[[noreturn]] void misuse(const char *section, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

}  // namespace npusim
