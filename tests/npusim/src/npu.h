// The one NPU that all processes share.
#pragma once

#include <string>

namespace npusim {

// Keeps the NPU busy for some milliseconds with a job of an IOMMU domain. Jobs of all processes
// that name the same file in NPUSIM_NPU come one after the other. Returns false where the driver
// would have given up. `what` goes into the trace.
bool npu_work(int domain, double milliseconds, const char *what);

// The simulator's own checks take time that no real library would need. While one of these lives,
// that time is counted, and the work that follows on the same thread is so much shorter: the
// figures of a server are then not those of the checks.
class Checking {
  public:
    Checking();
    ~Checking();
    Checking(const Checking &) = delete;
    Checking &operator=(const Checking &) = delete;

  private:
    long since;
};

// Forgets what was counted; a run begins.
void npu_begin();

// Writes into the trace what was counted and is longer than the work that followed: it delays
// whoever waits, and no real library would take it.
void npu_settle();

}  // namespace npusim
