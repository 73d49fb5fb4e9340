#include "npu.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "config.h"
#include "trace.h"

namespace npusim {
namespace {

int active_domain(int fd) {
    char text[32] = {};
    return pread(fd, text, sizeof text - 1, 0) > 0 ? std::atoi(text) : 0;
}

// Fact sheet 5.4: one domain is active for the whole NPU, and who wants another one waits until
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
    long begin = now();
    sleep_until(begin + static_cast<long>(milliseconds * 1e6));
    long end = now();
    if (fd >= 0) close(fd);
    trace("npu", {{"what", what}, {"domain", domain}, {"begin", begin}, {"end", end}});
    return true;
}

}  // namespace npusim
