// Faults on demand.
//
// NPUSIM_FAULT is a list of KIND@PLACE[:after=TOKENS][:times=N][:every=N][:skip=N], separated by
// ";".
// Places: init, restore, prefill, decode (here), load, encode (the encoder stand-in). Kinds: segv, bus,
// ill, abrt, hang, wait (until the file NPUSIM_GO is there), and what the place itself does with any
// other word: fail, error, oom, zero, platform, empty.
// NPUSIM_FAULT_FILE names a file that counts how often each place was reached and each fault was
// done, so that "times" and "every" hold over processes; without it each process counts for
// itself. "every=10" strikes at every tenth visit of the place, "skip=1" not at the first.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>

#include "config.h"
#include "trace.h"

namespace npusim {
namespace {

std::mutex guard;
std::map<std::string, long> counts;

// Adds one to a counter and returns what it was before.
long count(const std::string &name) {
    std::string path = setting("NPUSIM_FAULT_FILE", "");
    if (path.empty()) {
        std::lock_guard<std::mutex> lock(guard);
        return counts[name]++;
    }
    path += "." + name;
    int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return 0;
    flock(fd, LOCK_EX);
    char text[32] = {};
    long before = pread(fd, text, sizeof text - 1, 0) > 0 ? std::atol(text) : 0;
    int size = std::snprintf(text, sizeof text, "%ld", before + 1);
    if (pwrite(fd, text, static_cast<size_t>(size), 0) < 0) std::perror("npusim: fault counter");
    close(fd);
    return before;
}

long option(const std::string &entry, const std::string &name, long otherwise) {
    size_t at = entry.find(":" + name + "=");
    return at == std::string::npos ? otherwise : std::atol(entry.c_str() + at + name.size() + 2);
}

[[noreturn]] void hang() {
    while (true) pause();
}

void wait() {
    std::string path = setting("NPUSIM_GO", "");
    while (access(path.c_str(), F_OK) != 0) usleep(500);
}

}  // namespace

std::string fault(const std::string &place, long tokens) {
    std::string all = setting("NPUSIM_FAULT", "");
    if (all.empty()) return "";
    std::istringstream list(all);
    std::string entry;
    for (int index = 0; std::getline(list, entry, ';'); index++) {
        size_t at = entry.find('@');
        if (at == std::string::npos) continue;
        std::string kind = entry.substr(0, at);
        std::string where = entry.substr(at + 1, entry.find(':', at) - at - 1);
        if (where != place || tokens != option(entry, "after", 0)) continue;
        std::string name = std::to_string(index) + "." + kind + "." + where;
        long every = option(entry, "every", 0);
        long skip = option(entry, "skip", 0);
        if (every > 0 || skip > 0) {
            long visit = count(name + ".visits") + 1;
            if (visit <= skip || (every > 0 && visit % every != 0)) continue;
        }
        if (count(name) >= option(entry, "times", every > 0 ? 1L << 30 : 1)) continue;
        trace("fault", {{"kind", kind}, {"place", place}});
        if (kind == "segv") die(SIGSEGV);
        // Fact 7e: Illegal instruction (#518), GGML_ASSERT (#111); 1.5b: SIGBUS [C].
        if (kind == "bus") die(SIGBUS);
        if (kind == "ill") die(SIGILL);
        if (kind == "abrt") die(SIGABRT);
        if (kind == "hang") hang();
        if (kind == "wait") {
            wait();
            continue;
        }
        return kind;
    }
    return "";
}

}  // namespace npusim
