// Which version this library is; for what does not depend on the layout.
#pragma once

namespace npusim {

extern const int abi;          // 121, 122, 123, 130 or 131
extern const char *const version;  // such as "1.3.0"

}  // namespace npusim
