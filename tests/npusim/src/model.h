// The stand-in for a .rkllm file: 256 bytes of header, then lines "key=value".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace npusim {

struct Token {
    int32_t id;
    std::string text;
};

// Keys that a file may have; tests/npusim/models.py writes them.
struct Model {
    std::string toolkit = "1.2.3";
    std::string platform = "RK3588";
    std::string dtype = "W8A8";
    int limit = 4096;         // max_context_limit
    int cores = 3;            // npu_core_num
    int embed = 32;           // floats of one embedding
    int outputs = 1;          // rows of a picture have embed x outputs floats
    int merge = 0;            // pixels of one image token's side; 0: not checked
    int vocabulary = 1000;
    int piece = 4;            // bytes of plain text that make one token, at most
    bool reuse = true;        // whether a prefix of the cache can be reused
    bool signed_rows = false; // rows carry the marks of tests/npusim/python/rknnlite
    bool has_tokenizer = true;
    bool has_embedding = true;
    bool cross = false;
    int layers = 0, kv_heads = 0, head_dim = 0; // of a cross-attention cache
    int megabytes = 0;        // NPU memory
    int32_t eos = 2;
    std::string template_prefix, template_postfix; // what the built-in template puts around
    std::vector<std::pair<std::string, int32_t>> specials;
    std::vector<int32_t> byte_ids; // of 256 one-byte tokens; empty: ids are hashes

    std::vector<Token> tokenise(const std::string &text, bool parse_specials) const;
};

// Reads a file. Returns false, with the library's words printed, where it is no model.
bool read_model(const std::string &path, Model &model);

}  // namespace npusim
