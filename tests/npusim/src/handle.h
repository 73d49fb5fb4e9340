// A handle and what of the caller's memory belongs to it; the layout of the version is read here.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "rkllm.h"
#include "session.h"

namespace npusim {

struct Handle {
    explicit Handle(Settings settings) : session(std::move(settings)) {}

    Session session;
    std::string model_path;
    LLMResultCallback callback = nullptr;
    void *userdata = nullptr;
    // What the caller must keep alive until rkllm_destroy, and how it looked at rkllm_init.
    struct Kept {
        const void *at;
        std::vector<uint8_t> bytes;
        std::string what;
    };
    std::vector<Kept> kept;
};

#if NPUSIM_ABI >= 130
using CallbackArgument = RKLLMCallback *;
#else
using CallbackArgument = LLMResultCallback;
#endif

std::unique_ptr<Handle> read_param(const RKLLMParam *param, CallbackArgument callback);
RunParam read_infer(const RKLLMInferParam *infer);
std::vector<Request> read_inputs(const Handle &handle, const RKLLMInput *inputs);

// Misuse where something that had to be kept has changed or gone.
void check_kept(const Handle &handle);

// Calls the result callback once; the text is poisoned when it returns.
int call_back(const Handle &handle, std::vector<Event> &events, State state, void *userdata);

void trace_run(const Handle &handle, const std::vector<Request> &requests, const RunParam &param);

}  // namespace npusim
