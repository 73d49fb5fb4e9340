// One run, from the cache to the last event.
#include <cmath>
#include <csignal>
#include <fstream>

#include "config.h"
#include "mind.h"
#include "npu.h"
#include "session.h"
#include "trace.h"
#include "version.h"

namespace npusim {

size_t Session::reuse(Lane &lane, size_t index, bool keep_history) {
    std::vector<Place> &held = cache[index];
    std::string pictures = setting("NPUSIM_PICTURES", "apart");
    if (keep_history) {
        // Fact 2.4c: the new turn is appended to what is there.
        size_t added = lane.places.size();
        held.insert(held.end(), lane.places.begin(), lane.places.end());
        return added;
    }
    auto shared = [&](const std::vector<Place> &places) {
        size_t count = 0;
        while (count < places.size() && count < lane.places.size()) {
            const Place &a = places[count], &b = lane.places[count];
            if (a.id != b.id || a.picture != b.picture) break;
            // Fact 2.4d: whether pictures of the same size are told apart is open. That they are
            // reused at all was seen with 1.2.1 alone.
            if (a.picture && pictures == "never") break;
            if (a.sum != b.sum && pictures != "blind") break;
            count++;
        }
        return count;
    };
    size_t common = 0;
    if (!model.reuse) {
        if (!held.empty())
            log("W rkllm: Current model does not support kv cache reuse. clearing all caches.");
    } else if (!(lane.request->kind == Kind::embed && abi < 123)) {  // fact 2.11a, #278
        common = shared(held);
    }
    size_t from_file = shared(loaded_cache);
    if (from_file > common) {
        held.assign(loaded_cache.begin(), loaded_cache.begin() + static_cast<long>(from_file));
        common = from_file;
    }
    // What is reused stays as it was computed: a blind library keeps the rows of the old picture.
    held.resize(common);
    held.insert(held.end(), lane.places.begin() + static_cast<long>(common), lane.places.end());
    return lane.places.size() - common;
}

bool Session::prefill(std::vector<Lane> &lanes, size_t &computed, float &milliseconds) {
    long begin = now();
    size_t left = computed;
    bool well = true;
    auto look_again = [&] {
        Checking checking;
        for (auto &lane : lanes)
            if (check_blocks(*lane.request) != lane.sum)
                misuse("1.4d", "the embeddings changed while the library read them");
    };
    // Before the last piece, not after it: a look takes some ms, which count as that piece's, while
    // behind the prefill they would delay the first token.
    if (left <= 128) look_again();
    // A pass over nothing still costs one token's time: 97 ms of 3045 in fact 2.4b.
    if (left == 0) well = work(prefill_ms_per_token(), "prefill");
    while (left > 0 && well) {
        // Fact 2.3b: not interruptible; 5.4a: but other work may come between two jobs.
        size_t chunk = std::min<size_t>(left, 128);
        well = work(static_cast<double>(chunk) * prefill_ms_per_token(),
                        "prefill");
        left -= chunk;
        if (left > 0 && left <= 128) look_again();
    }
    milliseconds = static_cast<float>(now() - begin) / 1e6F;
    npu_settle();
    for (size_t i = 0; i < lanes.size(); i++) prompt_ends[i] = cache[i].size();
    return well;
}

int Session::run(const std::vector<Request> &requests, const RunParam &param, const Emit &emit) {
    std::vector<Lane> lanes(requests.size());
    npu_begin();
    long begin = now();
    {
        Checking checking;
        for (size_t i = 0; i < requests.size(); i++) {
            if (!prepare(requests[i], param, lanes[i])) {
                trace("refused", {});
                return -1;
            }
        }
    }
    std::string kind = fault("prefill");
    if (kind == "fail") return -1;
    size_t computed = 0, prompt = 0;
    for (size_t i = 0; i < lanes.size(); i++) {
        computed += reuse(lanes[i], i, param.keep_history);
        prompt += lanes[i].places.size();
    }
    paused = false;
    float prefill_ms = 0;
    bool well = prefill(lanes, computed, prefill_ms);
    trace("prefill", {{"begin", begin}, {"end", now()}, {"prompt", prompt},
                      {"computed", computed}, {"cached", prompt - computed},
                      {"rows", row_sums(cache[0], requests[0])}});
    if (!well || kind == "error") {
        std::vector<Event> nothing(lanes.size());
        cache.assign(cache.size(), {});
        emit(nothing, failed);
        return -1;
    }
    if (param.mode != Mode::generate) return give_floats(lanes, param, emit, computed);
    if (param.save) save_cache(param, lanes[0], 0);
    return generate(lanes, param, emit, computed, prefill_ms);
}

int Session::give_floats(std::vector<Lane> &lanes, const RunParam &param, const Emit &emit,
                         size_t computed) {
    std::vector<Event> events(lanes.size());
    // Fact 2.2d: a first event without payload was seen (#278).
    if (is("NPUSIM_HIDDEN_EMPTY_FIRST", "yes", "no")) emit(events, normal);
    int columns = param.mode == Mode::hidden ? model.embed : model.vocabulary;
    std::vector<std::vector<float>> payload;
    bool hidden = param.mode == Mode::hidden;
    // Fact 2.2f: logits of one token alone [C]; whether hidden states can be so too is open.
    bool last = is(hidden ? "NPUSIM_HIDDEN_ROWS" : "NPUSIM_LOGITS_ROWS", "last", "all");
    for (size_t i = 0; i < lanes.size(); i++) {
        std::vector<float> floats;
        size_t all = lanes[i].places.size(), from = last ? all - 1 : 0;
        // Fact 2.11b, #446: before 1.3.0 not for what the cache holds.
        if (hidden && abi < 130) from = std::max(from, all - std::min(all, computed));
        if (from == all) from = all - 1;
        for (size_t row = from; row < all; row++) {
            const Place &place = lanes[i].places[row];
            uint32_t base = place.picture ? place.sum : static_cast<uint32_t>(place.id);
            for (int column = 0; column < columns; column++)
                floats.push_back(static_cast<float>((base + static_cast<uint32_t>(column)) % 997));
        }
        payload.push_back(std::move(floats));
        events[i].columns = columns;
        events[i].rows = static_cast<int>(all - from);
    }
    for (size_t i = 0; i < lanes.size(); i++) events[i].floats = payload[i].data();
    int answer = emit(events, normal);
    // Fact 2.2h: before 1.3.0, and without the answer 2, the memory is not given back (#504).
    trace("floats", {{"rows", events[0].rows}, {"columns", columns}, {"released", answer == 2}});
    // The pointer is valid inside the callback alone: what is read later is no number.
    for (auto &floats : payload) floats.assign(floats.size(), NAN);
    if (is("NPUSIM_HIDDEN_FINISH", "yes", "no")) finish(emit, lanes.size(), 0, 0, 0, 0);
    return 0;
}

std::vector<Token> Session::answer_of(const Request &request, const RunParam &param,
                                      const std::vector<Place> &held,
                                      size_t prompt_tokens) const {
    if (setting("NPUSIM_MIND", "").empty())
        return model.tokenise(reply(*this, request, param, held, prompt_tokens), false);
    std::vector<std::string> texts;
    std::string text = wrapped(request);
    size_t at = 0;
    for (size_t i = 0; i < request.pictures.count; i++) {
        size_t end = text.find("<image>", at);
        texts.push_back(text.substr(at, end - at));
        at = end + 7;
    }
    texts.push_back(text.substr(at));
    int most = param.max_new > 0 ? param.max_new : settings.max_new;
    return think(texts, request.pictures, model.embed * model.outputs, most);
}

int Session::generate(std::vector<Lane> &lanes, const RunParam &param, const Emit &emit,
                      size_t computed, float prefill_ms) {
    int limit = param.max_new > 0 ? param.max_new : settings.max_new;
    std::string split = setting("NPUSIM_SPLIT", "waiting");
    std::vector<std::vector<Token>> answers;
    for (size_t i = 0; i < lanes.size(); i++) {
        answers.push_back(
            answer_of(*lanes[i].request, param, cache[i], lanes[i].places.size()));
    }
    // Fact 2.5c: with 1.3.0 a run ended at the end of a thought [C].
    for (auto &answer : answers) {
        std::string all;
        for (size_t i = 0; i < answer.size() && is("NPUSIM_THINK", "ends", "goes on"); i++) {
            all += answer[i].text;
            if (all.find("</think>") != std::string::npos) answer.resize(i + 1);
        }
    }
    std::vector<std::string> open(lanes.size());
    std::vector<bool> done(lanes.size(), false);
    long begin = now();
    int generated = 0;
    bool aborted = false;
    for (size_t step = 0; limit <= 0 || step < static_cast<size_t>(limit); step++) {
        if (abort_asked) {
            aborted = true;
            break;
        }
        std::string kind = fault("decode", static_cast<long>(step));
        // Fact 1.3f: the first token comes with the prefill.
        if (step > 0 && !work(decode_ms_per_token(), "decode")) kind = "error";
        std::vector<Event> events(lanes.size());
        std::vector<std::string> texts(lanes.size());
        if (kind == "error" || kind == "fail") {
            cache.assign(cache.size(), {});
            if (kind == "error") emit(events, failed);
            return -1;
        }
        State state = normal;
        bool any = false;
        for (size_t i = 0; i < lanes.size(); i++) {
            if (done[i]) continue;  // fact 2.7a: a negative token and no text
            const auto &answer = answers[i];
            size_t at = settings.ignore_eos && !answer.empty() ? step % answer.size() : step;
            any = true;
            if (at >= answer.size()) {
                done[i] = true;
                // Fact 2.2a: the end token arrives as NORMAL with empty text [M].
                if (is("NPUSIM_EOS_EVENT", "yes", "yes")) {
                    events[i].token = model.eos;
                    texts[i] = settings.skip_special ? "" : "</s>";
                    events[i].text = texts[i].c_str();
                    generated++;
                }
                continue;
            }
            events[i].token = answer[at].id;
            generated++;
            // Fact 2.4j: at the limit the window shifts and generation goes on.
            if (cache[i].size() >= static_cast<size_t>(settings.context)) {
                auto keep = static_cast<long>(std::max(0, settings.n_keep));
                cache[i].erase(cache[i].begin() + keep, cache[i].begin() + keep + 1);
            }
            cache[i].push_back({answer[at].id, false, 0});
            open[i] += answer[at].text;
            size_t last = open[i].size();
            while (last > 0 && (static_cast<unsigned char>(open[i][last - 1]) & 0xC0) == 0x80) last--;
            size_t need = 1;
            if (last > 0) {
                auto lead = static_cast<unsigned char>(open[i][last - 1]);
                need = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
            }
            bool whole = last == 0 || open[i].size() - last + 1 >= need;
            // Fact 2.2b: an incomplete character waits for the next NORMAL event.
            if (!whole && split == "waiting") {
                state = waiting;
            } else {
                texts[i] = open[i];
                events[i].text = texts[i].c_str();
                open[i].clear();
            }
        }
        if (!any) break;
        bool only_ends = true;
        for (size_t i = 0; i < lanes.size(); i++) only_ends = only_ends && done[i];
        bool silent = only_ends && !is("NPUSIM_EOS_EVENT", "yes", "yes");
        int answer = silent ? 0 : emit(events, state);
        if (answer == 1) {
            // Fact 2.2g: pause, in single-turn mode alone.
            if (param.keep_history) misuse("2.2g", "the callback returned 1 with keep_history");
            // Some users report crashes [C].
            if (is("NPUSIM_PAUSE", "segv", "works")) die(SIGSEGV);
            paused = true;
            return 0;
        }
        if (only_ends) break;
    }
    float milliseconds = static_cast<float>(now() - begin) / 1e6F;
    // Fact 2.2c: one FINISH at the end, after an abort too; a switch doubts that.
    if (!aborted || is("NPUSIM_FINISH_AFTER_ABORT", "yes", "yes"))
        finish(emit, lanes.size(), computed, prefill_ms, generated, milliseconds);
    trace("end", {{"aborted", aborted}, {"generated", generated}});
    return 0;
}

void Session::finish(const Emit &emit, size_t lanes, size_t computed, float prefill_ms,
                     int generated, float milliseconds) {
    std::vector<Event> events(lanes);
    for (Event &event : events) {
        event.finish = true;
        event.prefill_ms = prefill_ms;
        event.prefill_tokens = static_cast<int>(computed);
        event.generate_ms = milliseconds;
        event.generated = std::max(0, generated - 1);  // fact 1.3f: without the first
    }
    print_run(computed, prefill_ms, generated, milliseconds);
    emit(events, finished);
}

void Session::save_cache(const RunParam &param, const Lane &lane, size_t index) const {
    const std::string &path = param.save_cache;
    if (!model.reuse) {
        log("W rkllm: The qwen35 model does not support saving prompt cache!");  // fact 2.4e, #517
        return;
    }
    std::ofstream file(path.empty() ? "./prompt_cache.bin" : path);
    file << "NPUSIM PROMPT CACHE " << version << "\n";
    // Fact 2.4h, #492: 1.2.x cuts at the first picture; nobody says so of 1.3 [I].
    bool cut = abi < 130 || is("NPUSIM_SAVED_PICTURES", "cut", "whole");
    size_t saved = 0;
    for (const Place &place : lane.places) {
        if (place.picture && cut) break;
        saved++;
        file << place.id;
        if (place.picture) file << ":" << place.sum;
        file << " ";
    }
    // Fact 2.4i: of a run that is ended after the first token, that token may be in it [C].
    if (is("NPUSIM_SAVED_CACHE", "token", "prompt")) {
        auto answer = answer_of(*lane.request, param, cache[index], lane.places.size());
        if (!answer.empty()) file << answer[0].id;
    }
    copy_cache(saved);
    trace("save_cache", {{"path", path}});
}

}  // namespace npusim
