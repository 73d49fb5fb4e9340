// The 15 functions of the library: checks what the caller gives, copies it out of the layout of
// this version, and turns events into results.
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "config.h"
#include "handle.h"
#include "memory.h"
#include "rkllm.h"
#include "trace.h"
#include "version.h"

#define EXPORT __attribute__((visibility("default")))

using namespace npusim;

namespace {

std::mutex guard;
std::map<void *, std::unique_ptr<Handle>> handles;
std::set<void *> gone;

Handle &of(LLMHandle handle, const char *what) {
    std::lock_guard<std::mutex> lock(guard);
    auto at = handles.find(handle);
    if (at != handles.end()) return *at->second;
    // Fact 2.3c: abort, join the run, then destroy; nothing comes after that.
    if (gone.count(handle) > 0) misuse("2.3c", "%s after rkllm_destroy", what);
    misuse("2.1c", "%s with a handle that rkllm_init did not give", what);
}

Handle &idle(LLMHandle handle, const char *what) {
    Handle &found = of(handle, what);
    found.session.must_be_idle(what);
    return found;
}

int run(Handle &handle, RKLLMInput *input, RKLLMInferParam *infer, void *userdata) {
    RunParam param = read_infer(infer);
    std::vector<Request> requests = read_inputs(handle, input);
    trace_run(handle, requests, param);
    Session &session = handle.session;
    bool sticks = is("NPUSIM_IDLE_ABORT", "sticks", "ignored");
    if (!sticks) session.abort_asked = false;
    // Fact 2.1a: on the thread that called, measured for 1.3.1 alone.
    bool elsewhere = is("NPUSIM_CALLBACK_THREAD", "other", "caller");
    int rc = session.run(requests, param, [&](std::vector<Event> &events, State state) {
        if (!elsewhere) return call_back(handle, events, state, userdata);
        int answer = 0;
        std::thread([&] { answer = call_back(handle, events, state, userdata); }).join();
        return answer;
    });
    if (session.settings.cross && session.check_cross() != session.cross_sum)
        misuse("2.9b", "the caches changed during the run");
    session.cross_set = false;
    session.abort_asked = false;
    session.running = false;
    trace("run_end", {{"rc", rc}});
    return rc;
}

// Fact 2.1c: one request at a time for one handle.
void enter(Handle &handle, const char *what) {
    bool before = false;
    if (!handle.session.running.compare_exchange_strong(before, true))
        handle.session.must_be_idle(what);
    handle.session.runner = std::this_thread::get_id();
    check_kept(handle);
}

}  // namespace

extern "C" {

EXPORT RKLLMParam rkllm_createDefaultParam() {
    // Fact 1.3d: the defaults. Context and token limit are not in it [I].
    RKLLMParam param;
    std::memset(&param, 0, sizeof param);
    param.max_context_len = 512;
    param.max_new_tokens = 128;
    param.top_k = 40;
    param.n_keep = -1;
    param.top_p = 0.9F;
    param.temperature = 0.8F;
    param.repeat_penalty = 1.1F;
    param.mirostat_tau = 5.0F;
    param.mirostat_eta = 0.1F;
    // Fact 1.6c: that the defaults tell the layout is an inference [I].
    if (is("NPUSIM_DEFAULTS", "other", "known")) param.mirostat_tau = 6.0F;
    param.skip_special_token = true;
    param.extend_param.enabled_cpus_num = 4;
    param.extend_param.enabled_cpus_mask = 0xF0;
    param.extend_param.n_batch = 1;
    return param;
}

#if NPUSIM_ABI >= 130
EXPORT int rkllm_init(LLMHandle *handle, RKLLMParam *param, RKLLMCallback *callback) {
#else
EXPORT int rkllm_init(LLMHandle *handle, RKLLMParam *param, LLMResultCallback callback) {
#endif
    if (handle == nullptr) misuse("1.2b", "rkllm_init without a place for the handle");
    bool first = true;
    {
        std::lock_guard<std::mutex> lock(guard);
        first = handles.empty();
        // Fact 2.1d: one model in one process before 1.2.2.
        if (NPUSIM_ABI < 122 && !first) misuse("2.1d", "a second rkllm_init in one process");
    }
    *handle = nullptr;
    auto made = read_param(param, callback);
    print_parameters(made->session.settings);
    int rc = made->session.load(made->model_path);
    trace("init", {{"rc", rc}, {"path", made->model_path}, {"context", made->session.settings.context},
                   {"domain", made->session.settings.domain},
                   {"cpus", made->session.settings.cpus}, {"mask", made->session.settings.mask},
                   {"n_keep", made->session.settings.n_keep},
                   {"max_new", made->session.settings.max_new},
                   {"embed_flash", made->session.settings.embed_flash},
                   {"cross", made->session.settings.cross},
                   {"top_k", made->session.settings.sampling.top_k},
                   {"temperature", static_cast<double>(made->session.settings.sampling.temperature)},
                   {"repeat", static_cast<double>(made->session.settings.sampling.repeat)},
                   {"version", version}});
    if (rc == -2) {
        std::string how = setting("NPUSIM_OOM", "rc");
        // Fact 2.1e: 1.3.0 may crash instead (#522); old versions returned 0 (#156).
        if (how == "segv" || (how == "rc" && NPUSIM_ABI == 130 && !first)) __builtin_trap();
        return how == "zero" ? 0 : -1;
    }
    if (rc != 0) return -1;
    std::lock_guard<std::mutex> lock(guard);
    *handle = made.get();
    handles[*handle] = std::move(made);
    return 0;
}

EXPORT int rkllm_destroy(LLMHandle handle) {
    Handle &found = of(handle, "rkllm_destroy");
    if (found.session.asynchronous.joinable()) found.session.asynchronous.join();
    found.session.must_be_idle("rkllm_destroy");
    trace("destroy", {});
    std::lock_guard<std::mutex> lock(guard);
    // The memory is kept, so that no later handle has the same address.
    gone.insert(handle);
    (void)handles[handle].release();
    handles.erase(handle);
    return 0;
}

EXPORT int rkllm_run(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer, void *userdata) {
    Handle &found = of(handle, "rkllm_run");
    enter(found, "rkllm_run");
    return run(found, input, infer, userdata);
}

EXPORT int rkllm_run_async(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer,
                           void *userdata) {
    Handle &found = of(handle, "rkllm_run_async");
    // Fact 2.1b: up to 1.2.1 it was reported to return empty answers or none at all.
    if (NPUSIM_ABI < 122) return 0;
    enter(found, "rkllm_run_async");
    if (found.session.asynchronous.joinable()) found.session.asynchronous.join();
    found.session.asynchronous = std::thread([&found, input, infer, userdata] {
        found.session.runner = std::this_thread::get_id();
        run(found, input, infer, userdata);
    });
    return 0;
}

EXPORT int rkllm_abort(LLMHandle handle) {
    Session &session = of(handle, "rkllm_abort").session;
    bool running = session.running;
    trace("abort", {{"running", running}});
    // Fact 2.3a: returns at once. What it does to a handle that runs nothing is open.
    if (running || is("NPUSIM_IDLE_ABORT", "sticks", "ignored")) session.abort_asked = true;
    return 0;
}

EXPORT int rkllm_is_running(LLMHandle handle) {
    bool running = of(handle, "rkllm_is_running").session.running;
    // Fact 1.2e: the polarity of the documentation changed with 1.3.0.
    return NPUSIM_ABI >= 130 ? running : !running;
}

EXPORT int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter *adapter) {
    Handle &found = idle(handle, "rkllm_load_lora");
    copied(adapter, sizeof *adapter, alignof(RKLLMLoraAdapter), "RKLLMLoraAdapter");
    std::string path = text_at(adapter->lora_adapter_path, "lora_adapter_path");
    std::string name = text_at(adapter->lora_adapter_name, "lora_adapter_name");
    Model model;
    if (!read_model(path, model)) return -1;
    found.session.loras[name] = adapter->scale;
    trace("lora", {{"name", name}, {"scale", static_cast<double>(adapter->scale)}});
    return 0;
}

EXPORT int rkllm_load_prompt_cache(LLMHandle handle, const char *path) {
    std::string file = text_at(path, "prompt cache path");
    Session &session = idle(handle, "rkllm_load_prompt_cache").session;
    int rc = fault("restore").empty() ? session.load_cache(file) : -1;
    trace("load_cache", {{"path", file}, {"rc", rc}});
    return rc;
}

EXPORT int rkllm_release_prompt_cache(LLMHandle handle) {
    idle(handle, "rkllm_release_prompt_cache").session.release_cache();
    return 0;
}

EXPORT int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int *start_pos,
                                int *end_pos) {
    Session &session = idle(handle, "rkllm_clear_kv_cache").session;
    if (keep_system_prompt != 0 && keep_system_prompt != 1)
        misuse("2.4f", "keep_system_prompt is %d", keep_system_prompt);
    if ((start_pos == nullptr) != (end_pos == nullptr))
        misuse("2.4f", "rkllm_clear_kv_cache with one of two arrays");
    if (start_pos != nullptr) {
        if (!session.paused) misuse("2.4f", "a range of the cache can be cleared in a pause alone");
        size_t bytes = session.cache.size() * sizeof(int);
        copied(start_pos, bytes, sizeof(int), "start_pos");
        copied(end_pos, bytes, sizeof(int), "end_pos");
    }
    trace("clear", {{"keep_system", keep_system_prompt}, {"range", start_pos != nullptr}});
    return session.clear(keep_system_prompt != 0, start_pos, end_pos);
}

EXPORT int rkllm_get_kv_cache_size(LLMHandle handle, int *cache_sizes) {
    Session &session = idle(handle, "rkllm_get_kv_cache_size").session;
    // Fact 2.4g: open, so a library may say nothing at all.
    if (is("NPUSIM_KV_SIZE", "refused", "whole")) return -1;
    copied(cache_sizes, session.cache.size() * sizeof(int), sizeof(int), "cache_sizes");
    for (size_t lane = 0; lane < session.cache.size(); lane++)
        cache_sizes[lane] = session.size_reported(lane);
    return 0;
}

EXPORT int rkllm_set_chat_template(LLMHandle handle, const char *system_prompt,
                                   const char *prompt_prefix, const char *prompt_postfix) {
    Session &session = idle(handle, "rkllm_set_chat_template").session;
    session.system = text_at(system_prompt, "system_prompt");
    session.prefix = text_at(prompt_prefix, "prompt_prefix");
    session.postfix = text_at(prompt_postfix, "prompt_postfix");
    session.own_template = true;
    // Fact 2.5a.
    log("W rkllm: Calling rkllm_set_chat_template will disable the internal automatic chat "
        "template parsing, including enable_thinking");
    bool raw = session.system.empty() && session.prefix.empty() && session.postfix.empty();
    trace("template", {{"raw", raw}});
    return 0;
}

EXPORT int rkllm_set_function_tools(LLMHandle handle, const char *system_prompt, const char *tools,
                                    const char *tool_response_str) {
    Session &session = idle(handle, "rkllm_set_function_tools").session;
    std::string system = text_at(system_prompt, "system_prompt");
    std::string list = text_at(tools, "tools");
    session.tool_response = text_at(tool_response_str, "tool_response_str");
    if (list.empty() || list[0] != '[') return -1;  // fact 7d: a JSON array
    session.tools = list == "[]" ? "" : system + list;
    return 0;
}

EXPORT int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam *params) {
    Session &session = idle(handle, "rkllm_set_cross_attn_params").session;
    // Fact 2.9a.
    if (!session.settings.cross || !session.model.cross) return -1;
    copied(params, sizeof *params, alignof(RKLLMCrossAttnParam), "RKLLMCrossAttnParam");
    if (params->num_tokens < 1) misuse("2.9a", "num_tokens is %d", params->num_tokens);
    session.cross = {params->encoder_k_cache, params->encoder_v_cache, params->encoder_mask,
                     params->encoder_pos, static_cast<size_t>(params->num_tokens)};
    session.cross_sum = session.check_cross();
    session.cross_set = true;
    trace("cross", {{"tokens", params->num_tokens}, {"sum", session.cross_sum}});
    return 0;
}

}  // extern "C"
