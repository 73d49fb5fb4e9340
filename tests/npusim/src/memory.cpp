#include "memory.h"

#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "trace.h"

namespace npusim {
namespace {

constexpr size_t most_text = 1 << 24;

// Asking the kernel to copy tells an unmapped address by an error instead of by a signal.
size_t readable(const void *from, void *to, size_t size) {
    iovec local{to, size};
    iovec remote{const_cast<void *>(from), size};
    ssize_t got = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
    if (got < 0 && (errno == EPERM || errno == ENOSYS)) {
        // A sandbox forbids the call: then a wrong pointer ends in a signal.
        std::memcpy(to, from, size);
        return size;
    }
    return got < 0 ? 0 : static_cast<size_t>(got);
}

using Tables = std::array<std::array<uint32_t, 256>, 8>;

Tables make_tables() {
    Tables tables{};
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t c = n;
        for (int bit = 0; bit < 8; bit++) c = (c & 1) != 0 ? 0xEDB88320U ^ (c >> 1) : c >> 1;
        tables[0][n] = c;
    }
    for (size_t n = 0; n < 256; n++)
        for (size_t k = 1; k < 8; k++)
            tables[k][n] = tables[0][tables[k - 1][n] & 0xFF] ^ (tables[k - 1][n] >> 8);
    return tables;
}

}  // namespace

void copy(const void *from, void *to, size_t size, size_t alignment, const char *what) {
    // Fact 1.4d: buffers must be alive and what the structure says that they are.
    if (from == nullptr) misuse("1.4d", "%s is NULL", what);
    if (reinterpret_cast<uintptr_t>(from) % alignment != 0)
        misuse("1.4d", "%s at %p is not aligned to %zu bytes", what, from, alignment);
    size_t got = size == 0 ? 0 : readable(from, to, size);
    if (got != size)
        misuse("1.4d", "%s: only %zu of %zu bytes are mapped: the call would read past the buffer",
               what, got, size);
}

std::vector<uint8_t> copied(const void *from, size_t size, size_t alignment, const char *what) {
    std::vector<uint8_t> bytes(size);
    copy(from, bytes.data(), size, alignment, what);
    return bytes;
}

std::string text_at(const char *from, const char *what) {
    if (from == nullptr) misuse("1.4d", "%s is NULL", what);
    std::string text;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const char *at = from;
    while (text.size() < most_text) {
        size_t left = page - reinterpret_cast<uintptr_t>(at) % page;
        std::vector<char> bytes(left);
        if (readable(at, bytes.data(), left) != left)
            misuse("1.4d", "%s at %p is not mapped to its end", what, static_cast<const void *>(from));
        for (char c : bytes) {
            if (c == '\0') return text;
            text += c;
        }
        at += left;
    }
    misuse("1.4d", "%s has no end", what);
}

uint32_t crc32(const void *data, size_t size, uint32_t before) {
    static const Tables tables = make_tables();
    const auto *bytes = static_cast<const uint8_t *>(data);
    uint32_t c = ~before;
    // Eight bytes at a time ("slicing by 8"), for pictures have megabytes of rows.
    for (; size >= 8; size -= 8, bytes += 8) {
        uint32_t low = 0, high = 0;
        std::memcpy(&low, bytes, 4);
        std::memcpy(&high, bytes + 4, 4);
        low ^= c;
        c = tables[7][low & 0xFF] ^ tables[6][low >> 8 & 0xFF] ^ tables[5][low >> 16 & 0xFF] ^
            tables[4][low >> 24] ^ tables[3][high & 0xFF] ^ tables[2][high >> 8 & 0xFF] ^
            tables[1][high >> 16 & 0xFF] ^ tables[0][high >> 24];
    }
    for (size_t i = 0; i < size; i++) c = tables[0][(c ^ bytes[i]) & 0xFF] ^ (c >> 8);
    return ~c;
}

}  // namespace npusim
