// A stand-in for librknnrt.so of an emulated board: the public calls of rknn_api.h that
// rknn-toolkit-lite2 makes. It computes nothing itself: model files and pixels go through a socket
// to tools/emulated/toolkit.py, which runs rknn-toolkit2's simulator.
//
// Declared by this project; the sizes and offsets are those that were measured on the vendor's
// header. What the real library does besides (its checks, its speed, its memory, its errors) is
// not proven by anything that runs on this one.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// What tells the version to whoever looks into the file.
EXPORT const char rknn_stand_in_banner[];
const char rknn_stand_in_banner[] = "librknnrt version: 2.5.0 (stand-in of an emulated board)";

namespace {

using rknn_context = uint64_t;

enum Code {
    SUCCESS = 0, FAIL = -1, PARAM_INVALID = -5, MODEL_INVALID = -6, CTX_INVALID = -7,
    INPUT_INVALID = -8, OUTPUT_INVALID = -9,
};
enum Query { IN_OUT_NUM = 0, INPUT_ATTR = 1, OUTPUT_ATTR = 2, SDK_VERSION = 5, MEM_SIZE = 6 };
enum Format : uint32_t { NCHW = 0, NHWC = 1, UNDEFINED = 3 };
enum Type : uint32_t { FLOAT32 = 0, FLOAT16 = 1, UINT8 = 3 };

struct InOutNum { uint32_t n_input, n_output; };

struct TensorAttr {
    uint32_t index, n_dims, dims[16];
    char name[256];
    uint32_t n_elems, size, fmt, type, qnt_type;
    int8_t fl;
    int32_t zp;
    float scale;
    uint32_t w_stride, size_with_stride;
    uint8_t pass_through;
    uint32_t h_stride;
};
static_assert(sizeof(TensorAttr) == 376 && offsetof(TensorAttr, name) == 72, "rknn_tensor_attr");
static_assert(offsetof(TensorAttr, n_elems) == 328 && offsetof(TensorAttr, fl) == 348, "");
static_assert(offsetof(TensorAttr, pass_through) == 368 && offsetof(TensorAttr, h_stride) == 372, "");

struct Input {
    uint32_t index;
    void *buf;
    uint32_t size;
    uint8_t pass_through;
    uint32_t type, fmt;
};
static_assert(sizeof(Input) == 32 && offsetof(Input, buf) == 8, "rknn_input");
static_assert(offsetof(Input, pass_through) == 20 && offsetof(Input, fmt) == 28, "rknn_input");

struct Output {
    uint8_t want_float, is_prealloc;
    uint32_t index;
    void *buf;
    uint32_t size;
};
static_assert(sizeof(Output) == 24 && offsetof(Output, buf) == 8, "rknn_output");

struct SdkVersion { char api_version[256], drv_version[256]; };
struct MemSize { uint8_t bytes[64]; };

struct Context {
    int fd = -1;
    std::vector<TensorAttr> inputs, outputs;
    std::vector<uint8_t> pixels;
    std::vector<float> floats;
    bool ran = false;
    ~Context() {
        if (fd >= 0) close(fd);
    }
};

std::mutex guard;
std::map<rknn_context, std::unique_ptr<Context>> contexts;

Context *of(rknn_context number) {
    std::lock_guard<std::mutex> lock(guard);
    auto at = contexts.find(number);
    return at == contexts.end() ? nullptr : at->second.get();
}

bool send_all(int fd, const void *data, size_t size) {
    const auto *at = static_cast<const char *>(data);
    while (size > 0) {
        ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
        if (sent <= 0) return false;
        at += sent;
        size -= static_cast<size_t>(sent);
    }
    return true;
}

bool read_all(int fd, void *data, size_t size) {
    auto *at = static_cast<char *>(data);
    while (size > 0) {
        ssize_t got = read(fd, at, size);
        if (got <= 0) return false;
        at += got;
        size -= static_cast<size_t>(got);
    }
    return true;
}

std::string read_line(int fd) {
    std::string line;
    for (char c = 0; read_all(fd, &c, 1) && c != '\n';) line += c;
    return line;
}

// Sends a command with bytes; returns the code that comes back, the rest of the line in `rest`.
int ask(int fd, const char *what, const void *data, size_t size, std::string &rest) {
    std::string head = std::string(what) + " " + std::to_string(size) + "\n";
    if (!send_all(fd, head.data(), head.size()) || !send_all(fd, data, size)) return FAIL;
    std::istringstream line(read_line(fd));
    int code = FAIL;
    line >> code;
    std::getline(line, rest);
    return code;
}

TensorAttr attribute(uint32_t index, const std::string &text, bool input) {
    TensorAttr attr;
    std::memset(&attr, 0, sizeof attr);
    std::istringstream line(text);
    std::string name;
    line >> name;
    attr.index = index;
    std::snprintf(attr.name, sizeof attr.name, "%s", name.c_str());
    attr.n_elems = 1;
    for (uint32_t dim = 0; line >> dim && attr.n_dims < 16;) {
        attr.dims[attr.n_dims++] = dim;
        attr.n_elems *= dim;
    }
    attr.size = attr.size_with_stride = 2 * attr.n_elems;
    attr.fmt = input ? NHWC : UNDEFINED;
    attr.type = FLOAT16;
    attr.scale = 1.0F;
    return attr;
}

const char *socket_path() {
    const char *named = std::getenv("EMULATED_RKNN");
    return named != nullptr ? named : "/run/emulated-rknn.sock";
}

int connected() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::snprintf(address.sun_path, sizeof address.sun_path, "%s", socket_path());
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof address) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

}  // namespace

EXPORT int rknn_init(rknn_context *context, void *model, uint32_t size, uint32_t, void *) {
    if (context == nullptr || model == nullptr || size == 0) return PARAM_INVALID;
    auto made = std::make_unique<Context>();
    made->fd = connected();
    if (made->fd < 0) return FAIL;
    std::string rest;
    int code = ask(made->fd, "init", model, size, rest);
    if (code != SUCCESS) return code;
    // " INPUTS OUTPUTS", then a line each: name and dimensions.
    size_t inputs = 0, outputs = 0;
    std::istringstream(rest) >> inputs >> outputs;
    for (uint32_t i = 0; i < inputs; i++)
        made->inputs.push_back(attribute(i, read_line(made->fd), true));
    for (uint32_t i = 0; i < outputs; i++)
        made->outputs.push_back(attribute(i, read_line(made->fd), false));
    std::lock_guard<std::mutex> lock(guard);
    *context = reinterpret_cast<rknn_context>(made.get());
    contexts[*context] = std::move(made);
    return SUCCESS;
}

EXPORT int rknn_destroy(rknn_context context) {
    std::lock_guard<std::mutex> lock(guard);
    return contexts.erase(context) == 1 ? SUCCESS : CTX_INVALID;
}

EXPORT int rknn_set_core_mask(rknn_context context, uint32_t mask) {
    if (of(context) == nullptr) return CTX_INVALID;
    bool known = mask <= 4 || mask == 7 || mask == 0xffff;
    return known ? SUCCESS : PARAM_INVALID;
}

EXPORT int rknn_query(rknn_context number, int command, void *info, uint32_t size) {
    Context *context = of(number);
    if (context == nullptr) return CTX_INVALID;
    if (info == nullptr) return PARAM_INVALID;
    if (command == IN_OUT_NUM && size >= sizeof(InOutNum)) {
        *static_cast<InOutNum *>(info) = {static_cast<uint32_t>(context->inputs.size()),
                                          static_cast<uint32_t>(context->outputs.size())};
        return SUCCESS;
    }
    if ((command == INPUT_ATTR || command == OUTPUT_ATTR) && size >= sizeof(TensorAttr)) {
        auto *attr = static_cast<TensorAttr *>(info);
        const auto &all = command == INPUT_ATTR ? context->inputs : context->outputs;
        if (attr->index >= all.size()) return PARAM_INVALID;
        *attr = all[attr->index];
        return SUCCESS;
    }
    if (command == SDK_VERSION && size >= sizeof(SdkVersion)) {
        auto *version = static_cast<SdkVersion *>(info);
        std::memset(version, 0, sizeof *version);
        std::snprintf(version->api_version, 256, "2.5.0 (stand-in of an emulated board)");
        std::snprintf(version->drv_version, 256, "none");
        return SUCCESS;
    }
    if (command == MEM_SIZE && size >= sizeof(MemSize)) {
        std::memset(info, 0, sizeof(MemSize));
        return SUCCESS;
    }
    // What a static model is answered when it is asked for its dynamic range, among others.
    return MODEL_INVALID;
}

EXPORT int rknn_inputs_set(rknn_context number, uint32_t count, Input *inputs) {
    Context *context = of(number);
    if (context == nullptr) return CTX_INVALID;
    if (inputs == nullptr || count != context->inputs.size() || count != 1) return INPUT_INVALID;
    const Input &input = inputs[0];
    bool fits = input.index == 0 && input.buf != nullptr && input.pass_through == 0 &&
                input.type == UINT8 && input.fmt == NHWC &&
                input.size == context->inputs[0].n_elems;
    if (!fits) return INPUT_INVALID;
    const auto *bytes = static_cast<const uint8_t *>(input.buf);
    context->pixels.assign(bytes, bytes + input.size);
    context->ran = false;
    return SUCCESS;
}

EXPORT int rknn_run(rknn_context number, void *) {
    Context *context = of(number);
    if (context == nullptr) return CTX_INVALID;
    if (context->pixels.empty()) return INPUT_INVALID;
    std::string rest;
    int code = ask(context->fd, "run", context->pixels.data(), context->pixels.size(), rest);
    if (code != SUCCESS) return code;
    size_t floats = 0;
    for (const TensorAttr &attr : context->outputs) floats += attr.n_elems;
    context->floats.resize(floats);
    context->ran = read_all(context->fd, context->floats.data(), floats * sizeof(float));
    return context->ran ? SUCCESS : FAIL;
}

EXPORT int rknn_outputs_get(rknn_context number, uint32_t count, Output *outputs, void *) {
    Context *context = of(number);
    if (context == nullptr) return CTX_INVALID;
    if (outputs == nullptr || count != context->outputs.size() || !context->ran)
        return OUTPUT_INVALID;
    const float *from = context->floats.data();
    for (uint32_t i = 0; i < count; i++) {
        size_t bytes = context->outputs[i].n_elems * sizeof(float);
        // Halves were never asked for.
        if (outputs[i].want_float != 1 || outputs[i].index != i) return OUTPUT_INVALID;
        if (outputs[i].is_prealloc == 0) {
            outputs[i].buf = std::malloc(bytes);
            outputs[i].size = static_cast<uint32_t>(bytes);
        } else if (outputs[i].size < bytes) {
            return OUTPUT_INVALID;
        }
        if (outputs[i].buf == nullptr) return FAIL;
        std::memcpy(outputs[i].buf, from, bytes);
        from += context->outputs[i].n_elems;
    }
    return SUCCESS;
}

EXPORT int rknn_outputs_release(rknn_context number, uint32_t count, Output *outputs) {
    if (of(number) == nullptr) return CTX_INVALID;
    for (uint32_t i = 0; outputs != nullptr && i < count; i++) {
        if (outputs[i].is_prealloc == 0) std::free(outputs[i].buf);
        outputs[i].buf = nullptr;
    }
    return SUCCESS;
}

EXPORT int rknn_wait(rknn_context, void *) { return SUCCESS; }
EXPORT int rknn_dup_context(rknn_context *, rknn_context *) { return FAIL; }
EXPORT int rknn_set_batch_core_num(rknn_context, int) { return FAIL; }
EXPORT int rknn_set_input_shapes(rknn_context, uint32_t, void *) { return MODEL_INVALID; }
