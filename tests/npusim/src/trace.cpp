#include "trace.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "config.h"

namespace npusim {
namespace {

std::string quoted(const std::string &text) {
    std::string out = "\"";
    for (unsigned char c : text) {
        char code[8];
        if (c == '"' || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c < 0x20) {
            std::snprintf(code, sizeof code, "\\u%04x", c);
            out += code;
        } else {
            out += static_cast<char>(c);
        }
    }
    return out + "\"";
}

}  // namespace

Value::Value(const std::string &text) : json(quoted(text)) {}
Value::Value(const char *text) : json(text == nullptr ? "null" : quoted(text)) {}
Value::Value(double number) {
    char text[40];
    std::snprintf(text, sizeof text, "%.9g", number);
    json = std::isfinite(number) ? text : "null";
}
Value::Value(int number) : json(std::to_string(number)) {}
Value::Value(long number) : json(std::to_string(number)) {}
Value::Value(unsigned long number) : json(std::to_string(number)) {}
Value::Value(unsigned number) : json(std::to_string(number)) {}
Value::Value(bool value) : json(value ? "true" : "false") {}
Value Value::raw(std::string json) {
    Value value;
    value.json = std::move(json);
    return value;
}

long now() {
    timespec ts{};
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000L + ts.tv_nsec;
}

void sleep_until(long nanoseconds) {
    timespec ts{nanoseconds / 1000000000L, nanoseconds % 1000000000L};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, nullptr) != 0) {
    }
}

void trace(const char *event, Fields fields) {
    std::string path = setting("NPUSIM_TRACE", "");
    if (path.empty()) return;
    std::string line = "{\"t\":" + std::to_string(now()) + ",\"pid\":" + std::to_string(getpid()) +
                       ",\"ev\":" + quoted(event);
    for (const auto &[name, value] : fields) line += ",\"" + std::string(name) + "\":" + value.json;
    line += "}\n";
    // One write to a file that is open for appending: lines of several processes stay whole.
    int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) return;
    if (write(fd, line.data(), line.size()) < 0) std::perror("npusim: trace");
    close(fd);
}

void log(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    // Fact 1.6b: on standard error or standard output.
    FILE *file = is("NPUSIM_LOG", "stdout", "stderr") ? stdout : stderr;
    std::vfprintf(file, format, arguments);
    va_end(arguments);
    // Not flushed: standard output is a pipe in a child, and the library need not care.
    std::fputc('\n', file);
}

void misuse(const char *section, const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    trace("misuse", {{"section", section}, {"text", text}});
    std::fprintf(stderr, "npusim: misuse (fact %s): %s\n", section, text);
    std::fflush(stderr);
    std::abort();
}

}  // namespace npusim
