#include "npu.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "config.h"
#include "trace.h"

namespace npusim {
namespace {

// Nanoseconds of checks that the next work contains.
thread_local long checked = 0;

// Where the file keeps when the last work ended.
constexpr off_t last_end_at = 64;

long last_end(int fd) {
    char text[32] = {};
    return pread(fd, text, sizeof text - 1, last_end_at) > 0 ? std::atol(text) : 0;
}

void ended(int fd, long at) {
    char text[32];
    int size = std::snprintf(text, sizeof text, "%-20ld\n", at);
    if (pwrite(fd, text, static_cast<size_t>(size), last_end_at) < 0) std::perror("npusim: NPU file");
}

int active_domain(int fd) {
    char text[32] = {};
    return pread(fd, text, sizeof text - 1, 0) > 0 ? std::atoi(text) : 0;
}

// Fact 5.4a: one domain is active for the whole NPU, and who wants another one waits until
// no work is in flight, at most 6000 ms, looking every 10 to 100 us.
bool take(int fd, int domain) {
    double patience = number("NPUSIM_SWITCH_LIMIT_MS", 6000.0);
    long waiting_since = 0;
    while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        long at = now();
        if (active_domain(fd) == domain) {
            waiting_since = 0;  // only the cores are busy: the job queues as long as it takes
        } else if (waiting_since == 0) {
            waiting_since = at;
        } else if (static_cast<double>(at - waiting_since) > patience * 1e6) {
            log("E RKNN: switch iommu domain time out, failed to switch iommu domain, id: %d",
                domain);
            trace("switch_timeout", {{"domain", domain}});
            return false;
        }
        usleep(100);
    }
    int before = active_domain(fd);
    if (before != domain) {
        char text[32];
        int size = std::snprintf(text, sizeof text, "%-12d\n", domain);
        if (pwrite(fd, text, static_cast<size_t>(size), 0) < 0) std::perror("npusim: NPU file");
        trace("switch", {{"from", before}, {"to", domain}});
        sleep_until(now() + static_cast<long>(number("NPUSIM_SWITCH_MS", 0.0) * 1e6));
    }
    return true;
}

}  // namespace

bool npu_work(int domain, double milliseconds, const char *what) {
    std::string path = setting("NPUSIM_NPU", "");
    int fd = -1;
    if (!path.empty()) {
        // Opened anew for each job: the lock belongs to the opening, so it also holds between
        // threads, and the kernel drops it when the process dies.
        fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (fd >= 0 && !take(fd, domain)) {
            close(fd);
            return false;
        }
    }
    long asked = static_cast<long>(milliseconds * 1e6);
    long begin = now() - std::min(checked, asked);
    // What others did meanwhile is theirs.
    if (fd >= 0) begin = std::min(now(), std::max(begin, last_end(fd)));
    checked = std::max(0L, checked - (now() - begin));
    sleep_until(begin + asked);
    long end = now();
    if (fd >= 0) {
        ended(fd, end);
        close(fd);
    }
    trace("npu", {{"what", what}, {"domain", domain}, {"begin", begin}, {"end", end}});
    return true;
}

Checking::Checking() : since(now()) {}
Checking::~Checking() { checked += now() - since; }

void npu_begin() { checked = 0; }

void npu_settle() {
    if (checked > 0) trace("checks", {{"end", now()}, {"ns", checked}});
    checked = 0;
}

}  // namespace npusim
