// Loading a model, and turning a request into the places that the cache shall hold.
#include "session.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "config.h"
#include "memory.h"
#include "npu.h"
#include "trace.h"
#include "version.h"

namespace npusim {

int Session::load(const std::string &path) {
    // Fact sheet 1.6: the lines that a load prints.
    log("I rkllm: rkllm-runtime version: %s, rknpu driver version: %s, platform: %s",
        version, setting("NPUSIM_DRIVER", "0.9.8").c_str(),
        setting("NPUSIM_PLATFORM", "RK3588").c_str());
    std::string kind = fault("init");
    if (kind == "platform") {
        log("E rkllm: Your platform is unknown"); // fact sheet 5.3
        return -1;
    }
    log("I rkllm: loading rkllm model from %s", path.c_str());
    if (!read_model(path, model)) return -1;
    log("I rkllm: rkllm-toolkit version: %s, max_context_limit: %d, npu_core_num: %d, "
        "target_platform: %s, model_dtype: %s",
        model.toolkit.c_str(), model.limit, model.cores, model.platform.c_str(),
        model.dtype.c_str());
    // Not in the fact sheet: that such a model is refused, but not in which words [I].
    if (model.platform != setting("NPUSIM_PLATFORM", "RK3588")) {
        log("E rkllm: The model is for the platform %s", model.platform.c_str());
        return -1;
    }
    // Fact sheet 2.8.
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
    // Fact sheet 2.4.
    if (settings.context > model.limit) {
        log("E rkllm: max_context[%d] must be less than the model's max_context_limit[%d]",
            settings.context, model.limit);
        return -1;
    }
    if (settings.batch < 1 || settings.batch > 100) {
        log("E rkllm: The n_batch must be between 1 and 100, but got %d", settings.batch);
        return -1; // fact sheet 1.6
    }
    if (model.merge > 0) log("I rkllm: Using mrope");
    double limit = number("NPUSIM_NPU_MEGABYTES", 1e9);
    if (kind == "oom" || model.megabytes > limit) {
        log("E RKNN: failed to malloc npu memory, size: %d, flags: 0x2", model.megabytes << 20);
        trace("oom", {});
        return -2;
    }
    if (!kind.empty()) return -1;
    npu_work(settings.domain, load_ms(), "load");
    cache.assign(static_cast<size_t>(settings.batch), {});
    prompt_ends.assign(static_cast<size_t>(settings.batch), 0);
    return 0;
}

std::string Session::wrapped(const Request &request) const {
    // Fact sheet 2.5: one user turn in the template of the file, or in the one that was set; three
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
        // Fact sheet 2.5: special tokens in raw text are parsed; contradicted by one project [C].
        return model.tokenise(text, is("NPUSIM_SPECIALS", "parsed", "parsed"));
    }
    std::vector<int32_t> ids;
    std::vector<Token> tokens;
    if (!text.empty() && (!ask_tokens || !ask_tokens(text, ids)))
        misuse("1.2", "the file has no tokenizer, so the tokenizer callback must give the tokens");
    for (int32_t id : ids) tokens.push_back({id, ""});
    return tokens;
}

uint32_t Session::check_block(const Block &block, const char *what) const {
    auto columns = static_cast<size_t>(model.embed) * static_cast<size_t>(model.outputs);
    auto bytes = copied(block.rows, block.count * block.tokens * columns * sizeof(float),
                        sizeof(float), what);
    // Fact sheet 3.4: the positions follow from the size in pixels, so it must be the true one.
    if (model.merge > 0) {
        auto side = static_cast<size_t>(model.merge);
        if (block.width % side != 0 || block.height % side != 0 ||
            (block.width / side) * (block.height / side) != block.tokens)
            misuse("3.4", "%s: %zu x %zu pixels do not make %zu tokens of %zu pixels", what,
                   block.width, block.height, block.tokens, side);
    }
    const auto *floats = reinterpret_cast<const float *>(bytes.data());
    auto embed = static_cast<size_t>(model.embed);
    // Rows that nobody has marked, such as those of a probe, cannot be told to be wrong.
    bool marked = false;
    for (size_t part = 0; part < block.count * block.tokens * columns / embed; part++)
        marked = marked || (floats[part * embed] >= 7000 && floats[part * embed] < 7016);
    for (size_t row = 0; row < block.count * block.tokens; row++) {
        for (size_t output = 0; output < columns / embed; output++) {
            const float *part = floats + row * columns + output * embed;
            for (size_t i = 0; i < embed; i++) {
                if (!std::isfinite(part[i])) misuse("2.10", "%s: a value is no number", what);
            }
            if (!model.signed_rows || !marked) continue;
            // Fact sheet 3.1 (7): row i holds output 0, 1, ... of token i, one after the other.
            // The encoder stand-in marks each part with its output, picture, row and checksum.
            uint32_t sum = crc32(part + 4, (embed - 4) * sizeof(float)) & 0xFFFFFF;
            auto index = static_cast<float>(row % block.tokens);
            float picture = floats[(row - row % block.tokens) * columns + 1];
            if (part[0] != 7000.0F + static_cast<float>(output) || part[1] != picture ||
                part[2] != index || part[3] != static_cast<float>(sum))
                misuse("3.1", "%s: row %zu, output %zu is not where it belongs: wrong stride, a "
                       "missing output, or a buffer that was freed", what, row, output);
        }
    }
    return crc32(bytes.data(), bytes.size());
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
            // Fact sheet 2.10: the runtime would read outside the buffer.
            misuse("2.10", "the prompt has more places than the call has pictures (%zu) or videos "
                   "(%zu)", request.pictures.count, request.frames.count);
        }
        at = next + 7;
    }
    if (picture != request.pictures.count || video != request.frames.count)
        misuse("2.10", "%zu pictures and %zu frames, but the prompt has %zu and %zu places",
               request.pictures.count, request.frames.count, picture, video);
    return true;
}

bool Session::prepare(const Request &request, const RunParam &param, Lane &lane) {
    lane.request = &request;
    if (request.refused) return false;
    if (param.mode == Mode::logits && settings.batch > 1) {
        log("E rkllm: Getting the logits is not supported for multiple batches"); // 2.2
        return false;
    }
    if (param.has_lora && loras.count(param.lora) == 0) {
        log("E rkllm: the lora adapter %s is not loaded", param.lora.c_str());
        return false;
    }
    if (settings.cross && !cross_set)
        misuse("2.9", "use_cross_attn, but rkllm_set_cross_attn_params was not called");
    bool textual = request.kind == Kind::prompt || request.kind == Kind::multimodal;
    // Fact sheet 1.3 (E): "user" or "tool"; what a tool says must be JSON.
    if (textual && request.role != "user" && request.role != "tool") return false;
    if (textual && request.role == "tool" &&
        request.prompt.find_first_of("[{") != 0)
        return false;
    switch (request.kind) {
        case Kind::prompt:
            for (const char *mark : {"<image>", "<video>", "<audio>"}) {
                bool known = mark[1] == 'i' || (mark[1] == 'v' && abi >= 130) ||
                             abi >= 131;
                // Fact sheet 7, last rows: what users write must not be expanded.
                if (known && request.prompt.find(mark) != std::string::npos)
                    misuse("7", "a text without pictures has the place %s", mark);
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
                // Fact sheet 2.4: from 1.2.3 on, embeddings themselves are compared.
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
            misuse("1.2", "the file has no embeddings, so the embedding callback must give them");
    }
    if (lane.places.empty()) return false;
    if (lane.places.size() > static_cast<size_t>(settings.context)) {
        trace("too_long", {{"tokens", lane.places.size()}});
        return false; // fact sheet 2.4: -1 without events
    }
    return true;
}

int Session::clear(bool keep_system, const int *from, const int *to) {
    for (size_t lane = 0; lane < cache.size(); lane++) {
        if (from != nullptr) {
            // Fact sheet 2.4: removes [start, end).
            auto size = static_cast<int>(cache[lane].size());
            if (from[lane] < 0 || to[lane] < from[lane] || to[lane] > size) return -1;
            cache[lane].erase(cache[lane].begin() + from[lane], cache[lane].begin() + to[lane]);
        } else if (!keep_system || is("NPUSIM_KEEP_SYSTEM", "no", "no")) {
            cache[lane].clear(); // fact sheet 2.4, measured: nothing was kept; open question 3
        } else {
            auto kept = tokens_of(system).size();
            if (cache[lane].size() > kept) cache[lane].resize(kept);
        }
        prompt_ends[lane] = std::min(prompt_ends[lane], cache[lane].size());
    }
    return 0;
}

int Session::size_reported(size_t lane) const {
    // Fact sheet 2.4: "number of stored positions"; what is stored after a run is open.
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
    for (int32_t id = 0; file >> id;) loaded_cache.push_back(id);
    return 0;
}

void Session::must_be_idle(const char *what) const {
    if (!running) return;
    bool inside = runner == std::this_thread::get_id();
    misuse("2.1", "%s while a run is going on%s", what, inside ? ", from its own callback" : "");
}

}  // namespace npusim
