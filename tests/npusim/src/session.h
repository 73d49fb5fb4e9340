// One handle: its settings, its key/value cache and its runs. Nothing here depends on the layout.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "model.h"

namespace npusim {

// What stands at one place of the cache: a token, or one row of a picture with its checksum.
struct Place {
    int32_t id = 0;
    bool picture = false;
    uint32_t sum = 0;
};

struct Sampling {
    int32_t top_k = 40;
    float top_p = 0, temperature = 0, repeat = 0, frequency = 0, presence = 0;
    int32_t mirostat = 0;
    float tau = 0, eta = 0;
};

struct Tags {
    std::string start, end, content;
};

// rkllm_init's parameters, copied.
struct Settings {
    int context = 0, max_new = 0, n_keep = -1, domain = 0, cpus = 0, batch = 1;
    unsigned mask = 0;
    bool embed_flash = false, cross = false, skip_special = true, ignore_eos = false, async = false;
    Sampling sampling;
    Tags tags;
};

enum class Kind { prompt = 0, token = 1, embed = 2, multimodal = 3 };
enum class Mode { generate = 0, hidden = 1, logits = 2 };

// Pictures, or the frames of videos: blocks of rows that go to the places of a marker.
struct Block {
    const float *rows = nullptr;
    size_t count = 0, tokens = 0, width = 0, height = 0;
    Tags tags;
};

// One lane of a run: an RKLLMInput, copied; the rows are still the caller's.
struct Request {
    Kind kind = Kind::prompt;
    std::string role, prompt;
    bool thinking = false;
    std::vector<int32_t> tokens;
    const float *embeds = nullptr;
    size_t embed_tokens = 0;
    Block pictures, frames;
    size_t frames_per_video = 1;
    bool refused = false; // the library returns -1
};

struct RunParam {
    Mode mode = Mode::generate;
    std::string lora, save_cache;
    bool has_lora = false, save = false, keep_history = false, has_sampling = false;
    Sampling sampling;
    int max_new = 0;
};

// What a callback is told; turned into an RKLLMResult by the layout's part.
struct Event {
    const char *text = nullptr;
    int32_t token = -1;
    const float *floats = nullptr; // hidden states or logits
    int columns = 0, rows = 0;
    bool finish = false;
    float prefill_ms = 0, generate_ms = 0;
    int prefill_tokens = 0, generated = 0;
};

// States of the callback, as in the ABI.
enum State { normal = 0, waiting = 1, finished = 2, failed = 3 };
using Emit = std::function<int(std::vector<Event> &lanes, State state)>;

// Gives the caller's token ids or embeddings, where the file has none (from 1.3.0).
using AskTokens = std::function<bool(const std::string &text, std::vector<int32_t> &ids)>;
using AskEmbeds = std::function<bool(std::vector<int32_t> &ids, int columns)>;

class Session {
  public:
    explicit Session(Settings settings) : settings(std::move(settings)) {}

    // Everything that rkllm_init does; 0 or -1.
    int load(const std::string &path);
    // Everything that rkllm_run does; `emit` calls the callback.
    int run(const std::vector<Request> &requests, const RunParam &param, const Emit &emit);
    // Misuse while a run is going on; `what` names the call.
    void must_be_idle(const char *what) const;

    int clear(bool keep_system, const int *from, const int *to);
    int load_cache(const std::string &path);
    void release_cache() { loaded_cache.clear(); }
    // Looks at the caches of rkllm_set_cross_attn_params, which stay the caller's, and keeps
    // where they are; returns the checksum of all.
    uint32_t check_cross() const;

    Settings settings;
    Model model;
    AskTokens ask_tokens;
    AskEmbeds ask_embeds;
    std::atomic<bool> running{false};
    std::atomic<bool> abort_asked{false};
    std::thread::id runner;
    std::thread asynchronous;
    std::map<std::string, float> loras;
    bool own_template = false, paused = false, cross_set = false;
    std::string system, prefix, postfix, tools, tool_response;
    uint32_t cross_sum = 0;
    struct {
        const float *k = nullptr, *v = nullptr, *mask = nullptr;
        const int32_t *positions = nullptr;
        size_t tokens = 0;
    } cross;
    std::vector<std::vector<Place>> cache; // of each lane
    int size_reported(size_t lane) const;

  private:
    struct Lane {
        const Request *request = nullptr;
        std::vector<Place> places; // of the prompt
        uint32_t sum = 0;          // of the caller's rows, before the prefill
    };
    bool prepare(const Request &request, const RunParam &param, Lane &lane);
    bool places_of_blocks(const Request &request, Lane &lane);
    // Looks at every float of the caller's block; returns the checksum of all.
    uint32_t check_block(const Block &block, const char *what) const;
    uint32_t check_blocks(const Request &request) const;
    std::vector<Token> tokens_of(const std::string &text);
    std::vector<Token> answer_of(const Request &request, const RunParam &param,
                                 const std::vector<Place> &held, size_t prompt_tokens) const;
    std::string wrapped(const Request &request) const;
    size_t reuse(Lane &lane, size_t index, bool keep_history);
    bool prefill(std::vector<Lane> &lanes, size_t &computed, float &milliseconds);
    int give_floats(std::vector<Lane> &lanes, const RunParam &param, const Emit &emit,
                    size_t computed);
    // Keeps the NPU busy; false where the driver would have given up.
    bool work(double milliseconds, const char *what) const;
    int load_file(const std::string &path, const std::string &kind);
    int generate(std::vector<Lane> &lanes, const RunParam &param, const Emit &emit,
                 size_t computed, float prefill_ms);
    void finish(const Emit &emit, size_t lanes, size_t computed, float prefill_ms, int generated,
                float milliseconds);
    void save_cache(const RunParam &param, const Lane &lane, size_t lane_index) const;
    static void copy_cache(size_t tokens);
    std::vector<size_t> prompt_ends;
    std::vector<Place> loaded_cache;
};

// What an init prints of its parameters, where RKLLM_LOG_LEVEL is 2 or more.
void print_parameters(const Settings &settings);

// What a run prints where RKLLM_LOG_LEVEL is 1 or more.
void print_run(size_t computed, float prefill_ms, int generated, float generate_ms);

// The checksums of the pictures and frames that the cache holds, in order; "-" of none.
std::string row_sums(const std::vector<Place> &cache, const Request &request);

// The text of an answer, from what the cache holds. See reply.cpp.
std::string reply(const Session &session, const Request &request, const RunParam &param,
                  const std::vector<Place> &cache, size_t prompt_tokens);

}  // namespace npusim
