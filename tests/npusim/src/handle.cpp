#include "handle.h"

#include <cmath>
#include <cstring>

#include "memory.h"
#include "trace.h"

namespace npusim {
namespace {

// A structure's bytes, copied and aligned.
template <typename T>
T structure(const T *from, const char *what) {
    T value;
    auto bytes = copied(from, sizeof(T), alignof(T), what);
    std::memcpy(static_cast<void *>(&value), bytes.data(), sizeof(T));
    return value;
}

// Fact 1.1a: bool is one byte, 0 or 1; anything else comes from another layout.
bool flag(const bool *from, const char *what) {
    uint8_t byte = 0;
    std::memcpy(&byte, from, 1);
    if (byte > 1) misuse("1.1a", "%s is %d: is this another layout?", what, byte);
    return byte == 1;
}

Sampling sampling(int32_t top_k, float top_p, float temperature, float repeat, float frequency,
                  float presence, int32_t mirostat, float tau, float eta) {
    // Fact 1.4a: a float there, such as 40.0f, reads as an enormous number.
    if (top_k > 1 << 28 || top_k < 0) misuse("1.4a", "top_k is %d: it is an int32", top_k);
    for (float value : {top_p, temperature, repeat, frequency, presence, tau, eta}) {
        if (!std::isfinite(value) || value < -10.0F || value > 1000.0F)
            misuse("1.3e", "a sampling parameter is %g: is this another layout?",
                   static_cast<double>(value));
    }
    if (mirostat < 0 || mirostat > 2) misuse("1.3e", "mirostat is %d", mirostat);
    if (repeat == 0.0F || tau == 0.0F)
        misuse("1.3e", "a sampling parameter is 0: every field must be filled");
    return {top_k, top_p, temperature, repeat, frequency, presence, mirostat, tau, eta};
}

template <typename T>
void keep(Handle &handle, const T *at, size_t size, const char *what) {
    handle.kept.push_back({at, copied(at, size, 1, what), what});
}

void keep_text(Handle &handle, const char *text, const char *what) {
    keep(handle, text, text_at(text, what).size() + 1, what);
}

}  // namespace

std::unique_ptr<Handle> read_param(const RKLLMParam *from, CallbackArgument callback) {
    RKLLMParam param = structure(from, "RKLLMParam");
    const RKLLMExtendParam &extend = param.extend_param;
    Settings s;
    s.context = param.max_context_len;
    s.max_new = param.max_new_tokens;
    s.n_keep = param.n_keep;
    s.skip_special = flag(&param.skip_special_token, "skip_special_token");
    s.async = flag(&param.is_async, "is_async");
    s.sampling = sampling(param.top_k, param.top_p, param.temperature, param.repeat_penalty,
                          param.frequency_penalty, param.presence_penalty, param.mirostat,
                          param.mirostat_tau, param.mirostat_eta);
    s.domain = extend.base_domain_id;
    // Fact 5.4b: 16 domains.
    if (s.domain < 0 || s.domain > 15) misuse("5.4b", "base_domain_id is %d", s.domain);
    s.embed_flash = extend.embed_flash == 1;
    s.cpus = extend.enabled_cpus_num;
    s.mask = extend.enabled_cpus_mask;
    s.batch = extend.n_batch;
    s.cross = extend.use_cross_attn == 1;
    for (uint8_t byte : extend.reserved) {
        if (byte != 0) misuse("1.3d", "the reserved bytes are not those of the default");
    }
    auto handle = std::make_unique<Handle>(Settings{});
#if NPUSIM_ABI >= 130
    s.ignore_eos = flag(&param.ignore_eos_token, "ignore_eos_token");
    RKLLMCallback given = structure(callback, "RKLLMCallback");
    handle->callback = given.result_callback;
    handle->userdata = given.result_userdata;
    // Fact 1.2c: the structure stays the caller's, and stays alive.
    keep(*handle, callback, sizeof *callback, "RKLLMCallback");
    Session &session = handle->session;
    if (given.tokenizer_callback != nullptr) {
        session.ask_tokens = [given](const std::string &text, std::vector<int32_t> &ids) {
            ids.resize(text.size() + 16);
            int count = given.tokenizer_callback(given.tokenizer_userdata, text.c_str(),
                                                 static_cast<int32_t>(text.size()), ids.data(),
                                                 static_cast<int32_t>(ids.size()));
            if (count < 0 || static_cast<size_t>(count) > ids.size()) return false;
            ids.resize(static_cast<size_t>(count));
            return true;
        };
    }
    if (given.embed_callback != nullptr) {
        session.ask_embeds = [given](std::vector<int32_t> &ids, int columns) {
            std::vector<float> rows(ids.size() * static_cast<size_t>(columns), NAN);
            uint64_t bytes = rows.size() * sizeof(float);
            int rc = given.embed_callback(given.embed_userdata, ids.data(), ids.size(),
                                          rows.data(), bytes);
            for (float value : rows) {
                if (std::isnan(value)) misuse("1.2f", "the embedding callback left a gap");
            }
            return rc == 0;
        };
    }
#else
    handle->callback = callback;
    // Fact 1.4b: NULL there crashes the runtime.
    s.tags = {text_at(param.img_start, "img_start"), text_at(param.img_end, "img_end"),
              text_at(param.img_content, "img_content")};
    keep_text(*handle, param.img_start, "img_start");
    keep_text(*handle, param.img_end, "img_end");
    keep_text(*handle, param.img_content, "img_content");
#endif
    if (handle->callback == nullptr) misuse("1.2b", "rkllm_init without a result callback");
    handle->model_path = text_at(param.model_path, "model_path");
    keep_text(*handle, param.model_path, "model_path");
    handle->session.settings = s;
    return handle;
}

void check_kept(const Handle &handle) {
    for (const auto &kept : handle.kept) {
        if (copied(kept.at, kept.bytes.size(), 1, kept.what.c_str()) != kept.bytes)
            misuse("1.4d", "%s was freed or changed since rkllm_init", kept.what.c_str());
    }
}

RunParam read_infer(const RKLLMInferParam *from) {
    RKLLMInferParam infer = structure(from, "RKLLMInferParam");
    RunParam param;
    if (infer.mode < 0 || infer.mode > 2) misuse("1.2a", "the mode is %d", infer.mode);
    param.mode = static_cast<Mode>(infer.mode);
    if (infer.keep_history != 0 && infer.keep_history != 1)
        misuse("1.3c", "keep_history is %d: is this another layout?", infer.keep_history);
    param.keep_history = infer.keep_history == 1;
    if (infer.lora_params != nullptr) {
        param.has_lora = true;
        param.lora = text_at(structure(infer.lora_params, "RKLLMLoraParam").lora_adapter_name,
                             "lora_adapter_name");
    }
    if (infer.prompt_cache_params != nullptr) {
        auto cache = structure(infer.prompt_cache_params, "RKLLMPromptCacheParam");
        param.save = cache.save_prompt_cache != 0;
        if (param.save) param.save_cache = text_at(cache.prompt_cache_path, "prompt_cache_path");
    }
#if NPUSIM_ABI >= 130
    if (infer.sampling_params != nullptr) {
        auto s = structure(infer.sampling_params, "RKLLMSamplingParam");
        param.has_sampling = true;
        param.sampling = sampling(s.top_k, s.top_p, s.temperature, s.repeat_penalty,
                                  s.frequency_penalty, s.presence_penalty, s.mirostat,
                                  s.mirostat_tau, s.mirostat_eta);
    }
    param.max_new = infer.max_new_tokens;
#endif
    return param;
}

namespace {

// Fact 2.10b: both counts are required.
bool counted(size_t count, size_t tokens) {
    if (count > 0 && tokens > 0) return true;
    log("E rkllm: The n_image/n_image_token of multimodal_input is not set");
    return false;
}

void read_multimodal([[maybe_unused]] const Handle &handle, const RKLLMMultiModalInput &m,
                     Request &request) {
    request.prompt = text_at(m.prompt, "the prompt");
#if NPUSIM_ABI < 130
    request.refused = !counted(m.n_image, m.n_image_tokens);
    if (request.refused) return;
    request.pictures = {m.image_embed, m.n_image, m.n_image_tokens, m.image_width, m.image_height,
                        handle.session.settings.tags};
#else
    if (m.image.n_image > 0 || m.video.n_video == 0) {
        request.refused = !counted(m.image.n_image, m.image.n_image_tokens);
        if (request.refused) return;
        request.pictures = {m.image.image_embed, m.image.n_image, m.image.n_image_tokens,
                            m.image.image_width, m.image.image_height,
                            {text_at(m.image.image_start, "image_start"),
                             text_at(m.image.image_end, "image_end"),
                             text_at(m.image.image_content, "image_content")}};
    }
    if (m.video.n_video > 0) {
        // Fact 2.10d: [n_video][n_frame_per_video][n_frame_tokens][row].
        request.refused = !counted(m.video.n_frame_per_video, m.video.n_frame_tokens);
        if (request.refused) return;
        request.frames = {m.video.video_embed, m.video.n_video * m.video.n_frame_per_video,
                          m.video.n_frame_tokens, m.video.frame_width, m.video.frame_height,
                          {text_at(m.video.video_start, "video_start"),
                           text_at(m.video.video_end, "video_end"),
                           text_at(m.video.video_content, "video_content")}};
        request.frames_per_video = m.video.n_frame_per_video;
    }
#endif
#if NPUSIM_ABI >= 131
    if (m.audio.n_audio != 0 || m.audio.audio_embed != nullptr)
        misuse("1.5a", "the audio member is not zero: was the input zeroed?");
#endif
}

}  // namespace

std::vector<Request> read_inputs(const Handle &handle, const RKLLMInput *inputs) {
    std::vector<Request> requests;
    // Fact 2.7a: the array's stride is the size of this version's structure.
    for (int lane = 0; lane < handle.session.settings.batch; lane++) {
        RKLLMInput input = structure(inputs + lane, "RKLLMInput");
        Request request;
        request.thinking = flag(&input.enable_thinking, "enable_thinking");
        if (input.input_type > 3) misuse("1.2a", "the input type is %u", input.input_type);
        request.kind = static_cast<Kind>(input.input_type);
        bool textual = request.kind == Kind::prompt || request.kind == Kind::multimodal;
        if (textual || input.role != nullptr) request.role = text_at(input.role, "role");
        switch (request.kind) {
            case Kind::prompt:
                request.prompt = text_at(input.prompt_input, "the prompt");
                break;
            case Kind::token: {
                auto bytes = copied(input.token_input.input_ids,
                                    input.token_input.n_tokens * sizeof(int32_t), sizeof(int32_t),
                                    "input_ids");
                request.tokens.resize(input.token_input.n_tokens);
                std::memcpy(request.tokens.data(), bytes.data(), bytes.size());
                break;
            }
            case Kind::embed:
                request.embeds = input.embed_input.embed;
                request.embed_tokens = input.embed_input.n_tokens;
                break;
            case Kind::multimodal:
                read_multimodal(handle, input.multimodal_input, request);
                break;
        }
        requests.push_back(std::move(request));
    }
    return requests;
}

int call_back(const Handle &handle, std::vector<Event> &events, State state, void *userdata) {
    std::vector<RKLLMResult> results(events.size());
    std::vector<std::vector<char>> texts;
    for (size_t i = 0; i < events.size(); i++) {
        const Event &event = events[i];
        RKLLMResult &result = results[i];
        std::memset(&result, 0, sizeof result);
        result.token_id = event.token;
        if (event.text != nullptr) {
            texts.emplace_back(event.text, event.text + std::strlen(event.text) + 1);
            result.text = texts.back().data();
        }
        if (event.floats != nullptr && event.columns == handle.session.model.embed)
            result.last_hidden_layer = {event.floats, event.columns, event.rows};
        else if (event.floats != nullptr)
            result.logits = {event.floats, event.columns, event.rows};
        // Fact 1.3f: valid on FINISH alone; else what is read there is nonsense.
        result.perf = {-1e30F, -123456, -1e30F, -123456, -1e30F};
        if (event.finish)
            result.perf = {event.prefill_ms, event.prefill_tokens, event.generate_ms,
                           event.generated, 512.0F};
    }
    // Fact 1.2d: the userdata of the run wins over that of the init.
    void *data = userdata != nullptr ? userdata : handle.userdata;
    int answer = handle.callback(results.data(), data, static_cast<LLMCallState>(state));
    // Fact 2.2i: pointers are valid inside the callback alone.
    for (auto &text : texts) std::memset(text.data(), 0xDD, text.size());
    if (answer < 0 || answer > 2) misuse("1.2b", "the callback returned %d", answer);
    return answer;
}

void trace_run(const Handle &handle, const std::vector<Request> &requests, const RunParam &param) {
    static const char *kinds[] = {"prompt", "token", "embed", "multimodal"};
    const Sampling &s = param.has_sampling ? param.sampling : handle.session.settings.sampling;
    for (const Request &r : requests) {
        trace("run", {{"kind", kinds[static_cast<int>(r.kind)]},
                      {"mode", static_cast<int>(param.mode)},
                      {"role", r.role},
                      {"prompt", r.prompt},
                      {"pictures", r.pictures.count},
                      {"picture_tokens", r.pictures.tokens},
                      {"width", r.pictures.width},
                      {"height", r.pictures.height},
                      {"image_start", r.pictures.tags.start},
                      {"image_end", r.pictures.tags.end},
                      {"image_content", r.pictures.tags.content},
                      {"frames", r.frames.count},
                      {"frames_per_video", r.frames_per_video},
                      {"frame_tokens", r.frames.tokens},
                      {"frame_width", r.frames.width},
                      {"frame_height", r.frames.height},
                      {"video_start", r.frames.tags.start},
                      {"video_end", r.frames.tags.end},
                      {"video_content", r.frames.tags.content},
                      {"token_ids", r.tokens.size()},
                      {"embeds", r.embed_tokens},
                      {"keep_history", param.keep_history},
                      {"lora", param.lora},
                      {"max_new", param.max_new},
                      {"own_sampling", param.has_sampling},
                      {"top_k", s.top_k},
                      {"top_p", static_cast<double>(s.top_p)},
                      {"temperature", static_cast<double>(s.temperature)},
                      {"repeat", static_cast<double>(s.repeat)},
                      {"frequency", static_cast<double>(s.frequency)},
                      {"presence", static_cast<double>(s.presence)},
                      {"mirostat", s.mirostat}});
    }
}

}  // namespace npusim
