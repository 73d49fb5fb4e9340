#include "mind.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "config.h"
#include "trace.h"

namespace npusim {
namespace {

[[noreturn]] void fail(const char *what) {
    log("npusim: the mind %s", what);
    std::abort();
}

int connected() {
    std::string path = setting("NPUSIM_MIND", "");
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) fail("has too long a path");
    std::strcpy(address.sun_path, path.c_str());
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof address) != 0)
        fail("cannot be reached");
    return fd;
}

void send_all(int fd, const void *data, size_t size) {
    const auto *at = static_cast<const char *>(data);
    while (size > 0) {
        ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
        if (sent <= 0) fail("takes nothing");
        at += sent;
        size -= static_cast<size_t>(sent);
    }
}

std::string unhex(const std::string &text) {
    std::string out;
    for (size_t i = 0; i + 1 < text.size(); i += 2)
        out += static_cast<char>(std::strtol(text.substr(i, 2).c_str(), nullptr, 16));
    return out;
}

}  // namespace

std::vector<Token> think(const std::vector<std::string> &texts, const Block &pictures, int columns,
                         int most) {
    int fd = connected();
    std::string line = "{\"texts\":[";
    for (size_t i = 0; i < texts.size(); i++) line += (i == 0 ? "" : ",") + Value(texts[i]).json;
    line += "],\"pictures\":" + std::to_string(pictures.count) +
            ",\"tokens\":" + std::to_string(pictures.tokens) +
            ",\"columns\":" + std::to_string(columns) + ",\"most\":" + std::to_string(most) +
            ",\"start\":" + Value(pictures.tags.start).json +
            ",\"content\":" + Value(pictures.tags.content).json +
            ",\"end\":" + Value(pictures.tags.end).json + "}\n";
    send_all(fd, line.data(), line.size());
    send_all(fd, pictures.rows,
             pictures.count * pictures.tokens * static_cast<size_t>(columns) * sizeof(float));
    // Each line of the answer is a token's bytes in hexadecimal; the end of the stream ends it.
    std::vector<Token> tokens;
    std::string held;
    char bytes[4096];
    for (ssize_t got = 0; (got = read(fd, bytes, sizeof bytes)) > 0;)
        held.append(bytes, static_cast<size_t>(got));
    close(fd);
    size_t at = 0;
    for (size_t end = 0; (end = held.find('\n', at)) != std::string::npos; at = end + 1)
        tokens.push_back({static_cast<int32_t>(1000000 + tokens.size()),
                          unhex(held.substr(at, end - at))});
    if (held.substr(at) != "end") fail("stopped in the middle of a thought");
    return tokens;
}

}  // namespace npusim
