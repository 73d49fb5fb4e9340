// Looks at a caller's memory without trusting its pointers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace npusim {

// Copies `size` bytes; a pointer that is NULL, unaligned or not mapped to its end is misuse.
void copy(const void *from, void *to, size_t size, size_t alignment, const char *what);
std::vector<uint8_t> copied(const void *from, size_t size, size_t alignment, const char *what);

// Copies a C string. NULL is misuse.
std::string text_at(const char *from, const char *what);

// CRC-32 (that of zlib).
uint32_t crc32(const void *data, size_t size, uint32_t before = 0);

}  // namespace npusim
