// What the simulated model answers: what arrived, so that a test can read it from the answer.
#include "session.h"

#include <cstdio>

#include "config.h"
#include "memory.h"

namespace npusim {
namespace {

std::string hexadecimal(uint32_t value) {
    char text[16];
    std::snprintf(text, sizeof text, "%08x", value);
    return text;
}

std::string count_up(int tokens) {
    std::string text;
    for (int i = 0; i < tokens; i++) text += (i == 0 ? "t" : " t") + std::to_string(i);
    return text;
}

}  // namespace

// The checksums of the pictures that the cache holds: of each run of rows, over the checksums of
// its rows. Two pictures side by side, without tags between them, count as one run of rows that
// is cut by the number of tokens.
static std::string sums(const std::vector<Place> &cache, size_t tokens) {
    std::string all;
    for (size_t i = 0; i < cache.size();) {
        if (!cache[i].picture) {
            i++;
            continue;
        }
        uint32_t sum = 0;
        size_t count = 0;
        for (; i < cache.size() && cache[i].picture && (tokens == 0 || count < tokens); i++) {
            sum = crc32(&cache[i].sum, sizeof cache[i].sum, sum);
            count++;
        }
        all += (all.empty() ? "" : ",") + hexadecimal(sum);
    }
    return all.empty() ? "-" : all;
}

std::string row_sums(const std::vector<Place> &cache, const Request &request) {
    // The rows of all pictures and frames of a run are equally many.
    return sums(cache, request.pictures.count > 0 ? request.pictures.tokens
                                                  : request.frames.tokens);
}

std::string reply(const Session &session, const Request &request, const RunParam &param,
                  const std::vector<Place> &cache, size_t prompt_tokens) {
    std::string how = setting("NPUSIM_REPLY", "report");
    if (how == "count") return count_up(static_cast<int>(number("NPUSIM_REPLY_WORDS", 16)));
    if (how == "text") return setting("NPUSIM_REPLY_TEXT", "yes");
    if (how == "echo") return request.prompt;
    const Sampling &used = param.has_sampling ? param.sampling : session.settings.sampling;
    char tail[200];
    std::snprintf(tail, sizeof tail, " size=%zux%zu top_k=%d temperature=%.2f max=%d",
                  request.pictures.width, request.pictures.height, used.top_k,
                  static_cast<double>(used.temperature),
                  param.max_new > 0 ? param.max_new : session.settings.max_new);
    size_t pictures = request.pictures.count, videos = request.frames.count;
    std::string text = "pictures=" + std::to_string(pictures);
    if (videos > 0) {
        text += " videos=" + std::to_string(videos / request.frames_per_video) +
                " frames=" + std::to_string(videos);
    }
    text += " sums=" + row_sums(cache, request);
    text += " prompt=" + hexadecimal(crc32(request.prompt.data(), request.prompt.size()));
    text += " tokens=" + std::to_string(prompt_tokens) + tail;
    if (param.has_lora) text += " lora=" + param.lora;
    if (session.cross_set) text += " cross=" + hexadecimal(session.cross_sum);
    if (request.kind == Kind::embed) text += " embeds=" + std::to_string(request.embed_tokens);
    return text;
}

}  // namespace npusim
