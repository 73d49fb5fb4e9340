// What the library prints of its parameters and of a run, where RKLLM_LOG_LEVEL asks for it.
#include "config.h"
#include "session.h"
#include "trace.h"
#include "version.h"

namespace npusim {

void print_parameters(const Settings &s) {
    // Fact 1.6d: the names; how a line looks besides is not in it [I].
    if (number("RKLLM_LOG_LEVEL", 0) < 2) return;
    log("I rkllm: Max Context Length: %d", s.context);
    log("I rkllm: Max New Tokens: %d", s.max_new);
    log("I rkllm: Top-K: %d", s.sampling.top_k);
    log("I rkllm: Top-P: %.4f", static_cast<double>(s.sampling.top_p));
    log("I rkllm: Temperature: %.4f", static_cast<double>(s.sampling.temperature));
    log("I rkllm: Repeat Penalty: %.4f", static_cast<double>(s.sampling.repeat));
    log("I rkllm: N Keep: %d", s.n_keep);
    log("I rkllm: N Batch: %d", s.batch);
    log("I rkllm: Base Domain ID: %d", s.domain);
    log("I rkllm: Embed Flash: %d", s.embed_flash ? 1 : 0);
    log("I rkllm: use_cross_attn: %d", s.cross ? 1 : 0);
    log("I rkllm: Is Async: %d", s.async ? 1 : 0);
    log("I rkllm: Skip Special Token: %d", s.skip_special ? 1 : 0);
    if (abi >= 130) return;
    log("I rkllm: Image Start: %s", s.tags.start.c_str());
    log("I rkllm: Image End: %s", s.tags.end.c_str());
    log("I rkllm: Image Content: %s", s.tags.content.c_str());
}

void print_run(size_t computed, float prefill_ms, int generated, float generate_ms) {
    // Fact 2.12a: a table for each run.
    if (number("RKLLM_LOG_LEVEL", 0) < 1) return;
    log("I rkllm: Prefill  %8.2f ms %6zu tokens", static_cast<double>(prefill_ms), computed);
    log("I rkllm: Generate %8.2f ms %6d tokens", static_cast<double>(generate_ms), generated);
    log("I rkllm: Peak Memory Usage (GB): 0.50");
}

}  // namespace npusim
