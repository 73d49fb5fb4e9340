// One run, from the cache to the last event.
#include <cmath>
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
    bool blind = is("NPUSIM_PICTURES", "blind", "apart");
    if (keep_history) {
        // Fact sheet 2.4: the new turn is appended to what is there.
        size_t added = lane.places.size();
        held.insert(held.end(), lane.places.begin(), lane.places.end());
        return added;
    }
    size_t common = 0;
    if (!model.reuse) {
        if (!held.empty())
            log("W rkllm: Current model does not support kv cache reuse. clearing all caches.");
    } else if (!(lane.request->kind == Kind::embed && abi < 123)) {  // 2.11, #278
        while (common < held.size() && common < lane.places.size()) {
            const Place &a = held[common], &b = lane.places[common];
            // Open question 1: whether pictures of the same size are told apart.
            if (a.id != b.id || a.picture != b.picture || (!blind && a.sum != b.sum)) break;
            common++;
        }
    }
    size_t from_file = 0;
    while (from_file < loaded_cache.size() && from_file < lane.places.size() &&
           loaded_cache[from_file] == lane.places[from_file].id && !lane.places[from_file].picture)
        from_file++;
    if (from_file > common) {
        held.assign(lane.places.begin(), lane.places.begin() + static_cast<long>(from_file));
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
    // A pass over nothing still costs one token's time: 97 ms of 3045 in fact sheet 2.4.
    if (left == 0) well = npu_work(settings.domain, prefill_ms_per_token(), "prefill");
    while (left > 0 && well) {
        // Fact sheet 2.3: not interruptible; 5.4: but other work may come between two jobs.
        size_t chunk = std::min<size_t>(left, 128);
        well = npu_work(settings.domain, static_cast<double>(chunk) * prefill_ms_per_token(),
                        "prefill");
        left -= chunk;
    }
    milliseconds = static_cast<float>(now() - begin) / 1e6F;
    for (size_t i = 0; i < lanes.size(); i++) {
        if (check_blocks(*lanes[i].request) != lanes[i].sum)
            misuse("1.4", "the embeddings changed while the library read them");
        prompt_ends[i] = cache[i].size();
    }
    return well;
}

int Session::run(const std::vector<Request> &requests, const RunParam &param, const Emit &emit) {
    std::vector<Lane> lanes(requests.size());
    for (size_t i = 0; i < requests.size(); i++) {
        if (!prepare(requests[i], param, lanes[i])) {
            trace("refused", {});
            return -1;
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
    long begin = now();
    bool well = prefill(lanes, computed, prefill_ms);
    trace("prefill", {{"begin", begin}, {"end", now()}, {"prompt", prompt},
                      {"computed", computed}, {"cached", prompt - computed}});
    if (!well || kind == "error") {
        std::vector<Event> nothing(lanes.size());
        cache.assign(cache.size(), {});
        emit(nothing, failed);
        return -1;
    }
    if (param.mode != Mode::generate) return give_floats(lanes, param, emit);
    if (param.save) save_cache(param.save_cache, lanes[0]);
    return generate(lanes, param, emit, computed, prefill_ms);
}

int Session::give_floats(std::vector<Lane> &lanes, const RunParam &param, const Emit &emit) {
    std::vector<Event> events(lanes.size());
    // Fact sheet 2.2: a first event without payload was seen (#278).
    if (is("NPUSIM_HIDDEN_EMPTY_FIRST", "yes", "no")) emit(events, normal);
    int columns = param.mode == Mode::hidden ? model.embed : model.vocabulary;
    std::vector<std::vector<float>> payload;
    for (size_t i = 0; i < lanes.size(); i++) {
        std::vector<float> floats;
        for (size_t row = 0; row < lanes[i].places.size(); row++) {
            const Place &place = lanes[i].places[row];
            uint32_t base = place.picture ? place.sum : static_cast<uint32_t>(place.id);
            for (int column = 0; column < columns; column++)
                floats.push_back(static_cast<float>((base + static_cast<uint32_t>(column)) % 997));
        }
        payload.push_back(std::move(floats));
        events[i].columns = columns;
        events[i].rows = static_cast<int>(lanes[i].places.size());
    }
    for (size_t i = 0; i < lanes.size(); i++) events[i].floats = payload[i].data();
    int answer = emit(events, normal);
    // Fact sheet 2.2: before 1.3.0, and without the answer 2, the memory is not given back (#504).
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
        if (!npu_work(settings.domain, decode_ms_per_token(), "decode")) kind = "error";
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
            if (done[i]) continue;  // fact sheet 2.7: a negative token and no text
            const auto &answer = answers[i];
            size_t at = settings.ignore_eos && !answer.empty() ? step % answer.size() : step;
            any = true;
            if (at >= answer.size()) {
                done[i] = true;
                // Fact sheet 2.2: the end token arrives as NORMAL with empty text [M].
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
            // Fact sheet 2.4: at the limit the window shifts and generation goes on.
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
            // Fact sheet 2.2: an incomplete character waits for the next NORMAL event.
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
            // Fact sheet 2.2: pause, in single-turn mode alone.
            if (param.keep_history) misuse("2.2", "the callback returned 1 with keep_history");
            paused = true;
            return 0;
        }
        if (only_ends) break;
    }
    float milliseconds = static_cast<float>(now() - begin) / 1e6F;
    // Fact sheet 2.2 and 2.3: one FINISH at the end, after an abort too; a switch doubts that.
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
        event.generated = std::max(0, generated - 1);  // fact sheet 1.3 (E): without the first
    }
    emit(events, finished);
}

void Session::save_cache(const std::string &path, const Lane &lane) const {
    if (!model.reuse) {
        log("W rkllm: The qwen35 model does not support saving prompt cache!");  // 2.4, #517
        return;
    }
    std::ofstream file(path.empty() ? "./prompt_cache.bin" : path);
    file << "NPUSIM PROMPT CACHE " << version << "\n";
    for (const Place &place : lane.places) {
        if (place.picture) break;  // fact sheet 2.4, #492: cut at the first picture
        file << place.id << " ";
    }
    trace("save_cache", {{"path", path}});
}

}  // namespace npusim
