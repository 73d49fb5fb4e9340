// The one NPU that all processes share.
#pragma once

#include <string>

namespace npusim {

// Keeps the NPU busy for some milliseconds with a job of an IOMMU domain. Jobs of all processes
// that name the same file in NPUSIM_NPU come one after the other. Returns false where the driver
// would have given up. `what` goes into the trace.
bool npu_work(int domain, double milliseconds, const char *what);

}  // namespace npusim
