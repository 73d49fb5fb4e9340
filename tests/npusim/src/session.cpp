// Loading a model, and turning a request into the places that the cache shall hold.
#include "session.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <csignal>
#include <cstring>
#include <fstream>
#include <sstream>

#include "config.h"
#include "memory.h"
#include "npu.h"
#include "trace.h"
#include "version.h"

namespace npusim {

bool Session::work(double milliseconds, const char *what) const {
    // Fact 5.4c: a model of more than 4 GiB goes on in the domains after its own [I].
    int domains = is("NPUSIM_DOMAINS", "several", "one") ? 1 + model.megabytes / 4096 : 1;
    bool well = true;
    for (int i = 0; i < domains && well; i++)
        well = npu_work(settings.domain + i, milliseconds / domains, what);
    return well;
}

int Session::load(const std::string &path) {
    // Fact 1.6g: the lines that a load prints.
    log("I rkllm: rkllm-runtime version: %s, rknpu driver version: %s, platform: %s",
        version, setting("NPUSIM_DRIVER", "0.9.8").c_str(),
        setting("NPUSIM_PLATFORM", "RK3588").c_str());
    // Fact 5.3b: below 0.9.7 the libraries warn.
    if (older(setting("NPUSIM_DRIVER", "0.9.8"), "0.9.7"))
        log("W rkllm: the rknpu driver is older than 0.9.7, please update it");
    std::string kind = fault("init");
    if (kind == "platform") {
        log("E rkllm: Your platform is unknown"); // fact 5.3a
        return -1;
    }
    log("I rkllm: loading rkllm model from %s", path.c_str());
    int rc = load_file(path, kind);
    trace("loaded", {{"rc", rc}});
    return rc;
}

int Session::load_file(const std::string &path, const std::string &kind) {
    if (!read_model(path, model)) return -1;
    // Fact 1.5b: a model of another toolkit ended one load in SIGBUS [C].
    if (is("NPUSIM_TOOLKIT", "sigbus", "any") && model.toolkit != version) die(SIGBUS);
    log("I rkllm: rkllm-toolkit version: %s, max_context_limit: %d, npu_core_num: %d, "
        "target_platform: %s, model_dtype: %s",
        model.toolkit.c_str(), model.limit, model.cores, model.platform.c_str(),
        model.dtype.c_str());
    // Not in the fact sheet: that such a model is refused, but not in which words [I].
    if (model.platform != setting("NPUSIM_PLATFORM", "RK3588")) {
        log("E rkllm: The model is for the platform %s", model.platform.c_str());
        return -1;
    }
    // Fact 2.8a.
    if (settings.cpus < model.cores) {
        log("E rkllm: The number of enabled CPUs must be greater than or equal to the number of "
            "NPU cores.");
        return -1;
    }
    if (settings.mask != 0 && __builtin_popcount(settings.mask) != settings.cpus) {
        log("E rkllm: Mismatch between enabled CPUs mask and expected count. Please check the "
            "configuration.");
        return -1;
    }
    log("I rkllm: Enabled cpus num: %d", settings.cpus);
    // Fact 2.8b: harmless, in containers with other CPU numbers.
    if (is("NPUSIM_AFFINITY", "fails", "works")) log("error: set affinity failed");
    // Fact 2.4k.
    if (settings.context > model.limit) {
        log("E rkllm: max_context[%d] must be less than the model's max_context_limit[%d]",
            settings.context, model.limit);
        return -1;
    }
    if (settings.batch < 1 || settings.batch > 100) {
        log("E rkllm: The n_batch must be between 1 and 100, but got %d", settings.batch);
        return -1; // fact 1.6e
    }
    if (model.merge > 0) log("I rkllm: Using mrope");
    double limit = number("NPUSIM_NPU_MEGABYTES", 1e9);
    // Fact 7b: failed allocations are what an old driver looks like from above; 5.3b: 0.9.8
    // is required, but nobody says that an older one never works.
    bool old = older(setting("NPUSIM_DRIVER", "0.9.8"), "0.9.8") &&
               is("NPUSIM_OLD_DRIVER", "fails", "fails");
    if (kind == "oom" || old || model.megabytes > limit) {
        log("E RKNN: failed to malloc npu memory, size: %ld, flags: 0x2",
            static_cast<long>(model.megabytes) << 20);
        trace("oom", {});
        return -2;
    }
    if (!kind.empty()) return -1;
    if (!work(load_ms(), "load")) return -1;
    cache.assign(static_cast<size_t>(settings.batch), {});
    prompt_ends.assign(static_cast<size_t>(settings.batch), 0);
    return 0;
}

std::string Session::wrapped(const Request &request) const {
    // Fact 2.5a: one user turn in the template of the file, or in the one that was set; three
    // empty strings are raw mode.
    if (own_template) return system + prefix + request.prompt + postfix;
    std::string before = model.template_prefix, after = model.template_postfix;
    if (before.empty() && after.empty()) {
        before = "<|im_start|>user\n";
        after = "<|im_end|>\n<|im_start|>assistant\n";
    }
    return tools + before + request.prompt + after;
}

std::vector<Token> Session::tokens_of(const std::string &text) {
    if (model.has_tokenizer) {
        // Fact 2.5b: special tokens in raw text are parsed; contradicted by one project [C].
        return model.tokenise(text, is("NPUSIM_SPECIALS", "parsed", "parsed"));
    }
    std::vector<int32_t> ids;
    std::vector<Token> tokens;
    if (!text.empty() && (!ask_tokens || !ask_tokens(text, ids)))
        misuse("1.2f", "the file has no tokenizer, so the tokenizer callback must give the tokens");
    for (int32_t id : ids) tokens.push_back({id, ""});
    return tokens;
}

uint32_t Session::check_block(const Block &block, const char *what) const {
    auto columns = static_cast<size_t>(model.embed) * static_cast<size_t>(model.outputs);
    // Fact 3.4a: the positions follow from the size in pixels, so it must be the true one.
    if (model.merge > 0) {
        auto side = static_cast<size_t>(model.merge);
        if (block.width % side != 0 || block.height % side != 0 ||
            (block.width / side) * (block.height / side) != block.tokens)
            misuse("3.4a", "%s: %zu x %zu pixels do not make %zu tokens of %zu pixels", what,
                   block.width, block.height, block.tokens, side);
    }
    auto embed = static_cast<size_t>(model.embed);
    // Rows that nobody has marked, such as those of a probe, cannot be told to be wrong.
    bool marked = false, wrong = false;
    size_t wrong_row = 0, wrong_output = 0;
    uint32_t whole = 0;
    float picture = 0;
    // Row by row: a picture has megabytes of them, and the caller's memory is measured too.
    std::vector<float> floats(columns);
    for (size_t row = 0; row < block.count * block.tokens; row++) {
        copy(block.rows + row * columns, floats.data(), columns * sizeof(float), sizeof(float), what);
        whole = crc32(floats.data(), columns * sizeof(float), whole);
        if (row % block.tokens == 0) picture = floats[1];
        for (size_t output = 0; output < columns / embed; output++) {
            const float *part = floats.data() + output * embed;
            marked = marked || (part[0] >= 7000 && part[0] < 7016);
            for (size_t i = 0; i < embed; i++) {
                if (!std::isfinite(part[i])) misuse("2.10c", "%s: a value is no number", what);
            }
            if (!model.signed_rows) continue;
            // Fact 3.1c: row i holds output 0, 1, ... of token i, one after the other.
            // The encoder stand-in marks each part with its output, picture, row and checksum.
            uint32_t sum = crc32(part + 4, (embed - 4) * sizeof(float)) & 0xFFFFFF;
            auto index = static_cast<float>(row % block.tokens);
            if (!wrong && (part[0] != 7000.0F + static_cast<float>(output) || part[1] != picture ||
                           part[2] != index || part[3] != static_cast<float>(sum))) {
                wrong = true;
                wrong_row = row;
                wrong_output = output;
            }
        }
    }
    if (marked && wrong)
        misuse("3.1c", "%s: row %zu, output %zu is not where it belongs: wrong stride, a missing "
               "output, or a buffer that was freed", what, wrong_row, wrong_output);
    return whole;
}

uint32_t Session::check_cross() const {
    auto layers = static_cast<size_t>(model.layers), heads = static_cast<size_t>(model.kv_heads);
    auto dim = static_cast<size_t>(model.head_dim), tokens = cross.tokens;
    uint32_t sum = 0;
    auto read = [&](const void *from, size_t count, const char *what) {
        auto bytes = copied(from, count * 4, 4, what);
        sum = crc32(bytes.data(), bytes.size(), sum);
        std::vector<float> floats(count);
        std::memcpy(floats.data(), bytes.data(), bytes.size());
        return floats;
    };
    auto k = read(cross.k, layers * tokens * heads * dim, "encoder_k_cache");
    auto v = read(cross.v, layers * tokens * heads * dim, "encoder_v_cache");
    auto mask = read(cross.mask, tokens, "encoder_mask");
    read(cross.positions, tokens, "encoder_pos");
    for (const auto *block : {&k, &v, &mask})
        for (float value : *block)
            if (!std::isfinite(value)) misuse("2.9a", "a value of the caches is no number");
    // The encoder stand-in gives a key the number of its place, and its value a half more, so
    // that the two orders of the fact sheet can be told from every other: keys [layer][token]
    // [head][dim], values [layer][head][dim][token]. A single token of zeros marks nothing.
    bool marked = k[0] != 0.0F;
    for (size_t l = 0; marked && model.signed_rows && l < layers; l++) {
        for (size_t t = 0; t < tokens; t++) {
            for (size_t h = 0; h < heads; h++) {
                for (size_t d = 0; d < dim; d++) {
                    float key = k[((l * tokens + t) * heads + h) * dim + d];
                    float value = v[((l * heads + h) * dim + d) * tokens + t];
                    float first = k[t * heads * dim];
                    if (key != first + static_cast<float>((l * heads + h) * dim + d) ||
                        value != key + 0.5F)
                        misuse("2.9a", "layer %zu, token %zu, head %zu, %zu is not where it "
                               "belongs: wrong stride or count", l, t, h, d);
                }
            }
        }
    }
    return sum;
}

uint32_t Session::check_blocks(const Request &request) const {
    uint32_t sum = 0;
    if (request.pictures.count > 0) sum ^= check_block(request.pictures, "image_embed");
    if (request.frames.count > 0) sum ^= check_block(request.frames, "video_embed");
    return sum;
}

bool Session::places_of_blocks(const Request &request, Lane &lane) {
    const auto columns = static_cast<size_t>(model.embed * model.outputs);
    std::string text = wrapped(request);
    size_t picture = 0, video = 0, at = 0;
    auto add_text = [&](const std::string &part) {
        for (const Token &token : tokens_of(part)) lane.places.push_back({token.id, false, 0});
    };
    auto add_rows = [&](const Block &block, size_t index) {
        add_text(block.tags.start);
        auto content = model.tokenise(block.tags.content, true);
        int32_t id = content.empty() ? 0 : content[0].id;
        const float *rows = block.rows + index * block.tokens * columns;
        for (size_t i = 0; i < block.tokens; i++)
            lane.places.push_back({id, true, crc32(rows + i * columns, columns * sizeof(float))});
        add_text(block.tags.end);
    };
    while (true) {
        size_t image_at = text.find("<image>", at), video_at = text.find("<video>", at);
        if (abi < 130) video_at = std::string::npos;
        size_t next = std::min(image_at, video_at);
        add_text(text.substr(at, next == std::string::npos ? next : next - at));
        if (next == std::string::npos) break;
        if (next == image_at && picture < request.pictures.count) {
            add_rows(request.pictures, picture++);
        } else if (next == video_at && video < request.frames.count) {
            // All frames of one video stand between one pair of tags.
            Block whole = request.frames;
            whole.tokens *= request.frames_per_video;
            add_rows(whole, video / request.frames_per_video);
            video += request.frames_per_video;
        } else {
            // Fact 2.10a: the runtime would read outside the buffer.
            misuse("2.10a", "the prompt has more places than the call has pictures (%zu) or videos "
                   "(%zu)", request.pictures.count, request.frames.count);
        }
        at = next + 7;
    }
    if (picture != request.pictures.count || video != request.frames.count)
        misuse("2.10a", "%zu pictures and %zu frames, but the prompt has %zu and %zu places",
               request.pictures.count, request.frames.count, picture, video);
    return true;
}

bool Session::prepare(const Request &request, const RunParam &param, Lane &lane) {
    lane.request = &request;
    if (request.refused) return false;
    if (param.mode == Mode::logits && settings.batch > 1) {
        log("E rkllm: Getting the logits is not supported for multiple batches"); // fact 2.2e
        return false;
    }
    if (param.has_lora && loras.count(param.lora) == 0) {
        log("E rkllm: the lora adapter %s is not loaded", param.lora.c_str());
        return false;
    }
    // Fact 2.9b: before each run.
    if (settings.cross && !cross_set)
        misuse("2.9b", "use_cross_attn, but rkllm_set_cross_attn_params was not called");
    if (settings.cross && check_cross() != cross_sum)
        misuse("2.9b", "the caches changed since rkllm_set_cross_attn_params");
    bool textual = request.kind == Kind::prompt || request.kind == Kind::multimodal;
    // Fact 1.3g: "user" or "tool"; what a tool says must be JSON.
    if (textual && request.role != "user" && request.role != "tool") return false;
    if (textual && request.role == "tool" &&
        request.prompt.find_first_of("[{") != 0)
        return false;
    switch (request.kind) {
        case Kind::prompt:
            for (const char *mark : {"<image>", "<video>", "<audio>"}) {
                bool known = mark[1] == 'i' || (mark[1] == 'v' && abi >= 130) ||
                             abi >= 131;
                // Fact 7a, last rows: what users write must not be expanded.
                if (known && request.prompt.find(mark) != std::string::npos)
                    misuse("7a", "a text without pictures has the place %s", mark);
            }
            for (const Token &token : tokens_of(wrapped(request)))
                lane.places.push_back({token.id, false, 0});
            break;
        case Kind::token:
            for (int32_t id : request.tokens) lane.places.push_back({id, false, 0});
            break;
        case Kind::embed: {
            auto columns = static_cast<size_t>(model.embed);
            auto bytes = copied(request.embeds, request.embed_tokens * columns * sizeof(float),
                                sizeof(float), "embed");
            for (size_t i = 0; i < request.embed_tokens; i++) {
                uint32_t sum = crc32(bytes.data() + i * columns * sizeof(float),
                                     columns * sizeof(float));
                // Fact 2.4l: from 1.2.3 on, embeddings themselves are compared.
                lane.places.push_back({static_cast<int32_t>(sum & 0x7FFFFFFF), true, sum});
            }
            break;
        }
        case Kind::multimodal:
            lane.sum = check_blocks(request);
            places_of_blocks(request, lane);
            break;
    }
    if (!model.has_embedding && request.kind != Kind::embed) {
        std::vector<int32_t> ids;
        for (const Place &place : lane.places) ids.push_back(place.id);
        if (!ask_embeds || !ask_embeds(ids, model.embed))
            misuse("1.2f", "the file has no embeddings, so the embedding callback must give them");
    }
    if (lane.places.empty()) return false;
    if (lane.places.size() > static_cast<size_t>(settings.context)) {
        trace("too_long", {{"tokens", lane.places.size()}});
        return false; // fact 2.4j: -1 without events
    }
    return true;
}

int Session::clear(bool keep_system, const int *from, const int *to) {
    for (size_t lane = 0; lane < cache.size(); lane++) {
        if (from != nullptr) {
            // Fact 2.4f: removes [start, end).
            auto size = static_cast<int>(cache[lane].size());
            if (from[lane] < 0 || to[lane] < from[lane] || to[lane] > size) return -1;
            cache[lane].erase(cache[lane].begin() + from[lane], cache[lane].begin() + to[lane]);
        } else if (!keep_system || is("NPUSIM_KEEP_SYSTEM", "no", "no")) {
            cache[lane].clear(); // fact 2.4f, measured: nothing was kept; whether ever is open
        } else {
            auto kept = tokens_of(system).size();
            if (cache[lane].size() > kept) cache[lane].resize(kept);
        }
        prompt_ends[lane] = std::min(prompt_ends[lane], cache[lane].size());
    }
    return 0;
}

int Session::size_reported(size_t lane) const {
    // Fact 2.4g: "number of stored positions"; what is stored after a run is open.
    std::string how = setting("NPUSIM_KV_SIZE", "whole");
    if (how == "zero") return 0;
    return static_cast<int>(how == "prompt" ? std::min(prompt_ends[lane], cache[lane].size())
                                            : cache[lane].size());
}

int Session::load_cache(const std::string &path) {
    std::ifstream file(path);
    std::string magic;
    if (!std::getline(file, magic) || magic != std::string("NPUSIM PROMPT CACHE ") + version) return -1;
    loaded_cache.clear();
    Place place;
    for (std::string word; file >> word;) {
        place.picture = word.find(':') != std::string::npos;
        place.sum = 0;
        if (std::sscanf(word.c_str(), "%d:%u", &place.id, &place.sum) < 1) return -1;
        loaded_cache.push_back(place);
    }
    copy_cache(loaded_cache.size());
    return 0;
}

void Session::copy_cache(size_t tokens) {
    // Not in the fact sheet: what saving and loading take. Either copies the keys and values: those
    // of Qwen3-VL-2B are 28 layers x 8 heads x 128 x 2 of two bytes, 112 KiB a token, here at 1 GB/s
    // on a board, and a tenth of that time as everywhere. One core of an RK3588 copies several.
    double milliseconds = number("NPUSIM_RESTORE_MS", 0.0115) * static_cast<double>(tokens);
    std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(milliseconds));
}

void Session::must_be_idle(const char *what) const {
    if (!running) return;
    bool inside = runner == std::this_thread::get_id();
    misuse("2.1c", "%s while a run is going on%s", what, inside ? ", from its own callback" : "");
}

}  // namespace npusim
