#include "model.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "config.h"
#include "memory.h"
#include "trace.h"

namespace npusim {
namespace {

// Fact 1.6f: a 256-byte header that begins with the bytes "RLLM" and version 1 [C].
constexpr size_t header = 256;

std::string unescaped(const std::string &text) {
    std::string out;
    for (size_t i = 0; i < text.size(); i++) {
        if (text[i] == '\\' && i + 1 < text.size()) {
            i++;
            out += text[i] == 'n' ? '\n' : text[i];
        } else {
            out += text[i];
        }
    }
    return out;
}

void set(Model &m, const std::string &key, const std::string &value) {
    const std::map<std::string, int *> integers = {
        {"limit", &m.limit},       {"cores", &m.cores},         {"embed", &m.embed},
        {"outputs", &m.outputs},   {"merge", &m.merge},         {"vocabulary", &m.vocabulary},
        {"piece", &m.piece},       {"layers", &m.layers},       {"kv_heads", &m.kv_heads},
        {"head_dim", &m.head_dim}, {"megabytes", &m.megabytes}, {"eos", &m.eos},
    };
    const std::map<std::string, bool *> flags = {
        {"reuse", &m.reuse},
        {"signed_rows", &m.signed_rows},
        {"tokenizer", &m.has_tokenizer},
        {"embedding", &m.has_embedding},
        {"cross", &m.cross},
    };
    const std::map<std::string, std::string *> texts = {
        {"toolkit", &m.toolkit},
        {"platform", &m.platform},
        {"dtype", &m.dtype},
        {"template_prefix", &m.template_prefix},
        {"template_postfix", &m.template_postfix},
    };
    if (auto at = integers.find(key); at != integers.end()) {
        *at->second = std::atoi(value.c_str());
    } else if (auto at = flags.find(key); at != flags.end()) {
        *at->second = value == "1";
    } else if (auto at = texts.find(key); at != texts.end()) {
        *at->second = unescaped(value);
    } else if (key == "special") {
        size_t colon = value.find(':');
        m.specials.emplace_back(unescaped(value.substr(colon + 1)), std::atoi(value.c_str()));
    } else if (key == "byte_ids") {
        std::istringstream ids(value);
        for (std::string id; std::getline(ids, id, ',');) m.byte_ids.push_back(std::stoi(id));
    }
}

bool continues(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

// How many bytes the next piece of plain text has. Pieces begin anew at spaces and line feeds, so
// that two texts with a common beginning have common tokens, and hold whole characters; a line
// feed is a piece of its own.
size_t piece_size(const std::string &text, size_t at, size_t end, int most) {
    if (text[at] == '\n') return 1;
    size_t size = 1;
    while (at + size < end) {
        char c = text[at + size];
        bool inside = continues(c);
        if (!inside && (c == ' ' || c == '\n' || size >= static_cast<size_t>(most))) break;
        size++;
    }
    return size;
}

}  // namespace

std::vector<Token> Model::tokenise(const std::string &text, bool parse_specials) const {
    std::vector<Token> tokens;
    size_t at = 0;
    while (at < text.size()) {
        size_t next = text.size();
        const std::pair<std::string, int32_t> *found = nullptr;
        if (parse_specials) {
            for (const auto &special : specials) {
                size_t place = text.find(special.first, at);
                if (place == std::string::npos) continue;
                bool longer = found != nullptr && place == next &&
                              special.first.size() > found->first.size();
                if (place < next || longer) {
                    next = place;
                    found = &special;
                }
            }
        }
        while (at < next) {
            if (!byte_ids.empty()) {
                auto byte = static_cast<unsigned char>(text[at]);
                tokens.push_back({byte_ids[byte], text.substr(at, 1)});
                at++;
                continue;
            }
            size_t size = piece_size(text, at, next, piece);
            auto id = static_cast<int32_t>(1000 + crc32(text.data() + at, size) % 140000);
            tokens.push_back({id, text.substr(at, size)});
            at += size;
        }
        if (found != nullptr) {
            tokens.push_back({found->second, found->first});
            at = next + found->first.size();
        }
    }
    return tokens;
}

bool read_model(const std::string &path, Model &model) {
    std::ifstream file(path, std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    bool marked = bytes.compare(0, 4, "RLLM") == 0 || is("NPUSIM_HEADER", "any", "rllm");
    if (!file || bytes.size() < header || !marked) {
        // Fact 4.3a: the words for a file of another kind or time.
        log("E rkllm: invalid rknn llm model magic");
        return false;
    }
    std::istringstream lines(bytes.substr(header));
    bool whole = false;
    for (std::string line; std::getline(lines, line);) {
        size_t equals = line.find('=');
        if (equals != std::string::npos) set(model, line.substr(0, equals), line.substr(equals + 1));
        whole = whole || line == "end";
    }
    if (!whole) log("E rkllm: failed to load model, the file is truncated");
    return whole;
}

}  // namespace npusim
