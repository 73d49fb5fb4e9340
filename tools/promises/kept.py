"""Caches and residency."""

from __future__ import annotations

from tools.promises.change import Break

_POLICY = "tests/actors/test_policy.py"
_CACHES = "tests/actors/test_caches.py"
_OVERLAP = "tests/actors/test_overlap.py"
_RESIDENCY = "tests/actors/test_residency.py"
_RELOAD = "tests/actors/test_reload.py"
_TALKS = "tests/unit/test_conversations.py"
_NPU_TALKS = "tests/unit/test_rkllm_conversations.py"

CACHES = (
    Break(
        "embeddings keep within their bytes",
        "actors/embeddings.py",
        "while self.bytes > self._most:",
        "while False:",
        _CACHES,
    ),
    Break(
        "embeddings are those of the encoder's file",
        "actors/prepare.py",
        'f"{rule} {own} {number} of',
        'f"{rule} {number} of',
        "tests/actors/test_prepare_views.py",
    ),
    Break(
        "one picture, many clients, one encode",
        "actors/embeddings.py",
        "        while (flight := self._flights.get(key)) is not None:\n"
        "            await flight.wait()\n",
        "",
        _CACHES,
    ),
    Break(
        "rows that a job waits for leave last",
        "actors/embeddings.py",
        "if key not in self._wanted and key != new)",
        "if key != new)",
        _CACHES,
    ),
    Break(
        "hits are counted",
        "actors/embeddings.py",
        "        self.hits += 1\n",
        "",
        f"{_CACHES} tests/actors/test_metrics.py tests/e2e/test_metrics.py",
    ),
    Break(
        "the policy knows what the cache holds",
        "actors/scheduler.py",
        "        tools.lease.warm = tools.warm\n",
        "",
        _CACHES,
    ),
    Break(
        "the decoder says what it holds",
        "actors/pipeline.py",
        "tools.warm.learn(child, generation.done)",
        "pass",
        _CACHES,
    ),
    Break(
        "a conversation that left is not warm",
        "actors/warm.py",
        "        for number in done.forgot:\n            self._held.pop(number, None)\n",
        "",
        _CACHES,
    ),
    Break(
        "a beginning that all prompts share is not warmth",
        "actors/policy.py",
        "names[(len(names) - 1) // 2] in view.warm",
        "names[0] in view.warm",
        _POLICY,
    ),
    Break(
        "the system prompt starts from its file",
        "engine/rkllm_decoder.py",
        'if not text or self._has("no_prompt_cache"):',
        "if True:",
        "tests/unit/test_rkllm_more.py",
    ),
    Break(
        "conversations keep within their bytes on the CPU engine",
        "engine/conversations.py",
        "while self._kept and (self.kept_bytes > self._budget or len(self._kept) >= MOST):",
        "while False:",
        _TALKS,
    ),
    Break(
        "another conversation gets a cache of its own",
        "engine/conversations.py",
        "if 2 * shared < len(best.record) and self._size(best) <= self._budget:",
        "if False:",
        _TALKS,
    ),
    Break(
        "conversations on the NPU are off unless asked for",
        "engine/rkllm_conversations.py",
        "return self.budget > 0 and not self.why",
        "return not self.why",
        _NPU_TALKS,
    ),
    Break(
        "conversations on the NPU keep within their bytes",
        "engine/rkllm_conversations.py",
        "while self.bytes > self.budget or len(self._kept) > MOST:",
        "while False:",
        _NPU_TALKS,
    ),
    Break(
        "a model that cannot save keeps no conversations",
        "engine/rkllm_decoder.py",
        'why="this model cannot save any" if self._has("no_prompt_cache") else "",',
        'why="",',
        _NPU_TALKS,
    ),
    Break(
        "no pictures in files of a library that cuts there",
        "engine/rkllm_conversations.py",
        "if not self.on or not names or (len(parts) > 1 and not self.pictures):",
        "if not self.on or not names:",
        _NPU_TALKS,
    ),
    Break(
        "a library that confuses pictures is given no other one's",
        "engine/rkllm_conversations.py",
        "[s for s in self._kept if told_apart or not differs_at_picture(s.parts, parts)]",
        "list(self._kept)",
        _NPU_TALKS,
    ),
    Break(
        "restoring ends when computing is faster",
        "engine/rkllm_conversations.py",
        "return self.lost < STRIKES",
        "return True",
        _NPU_TALKS,
    ),
    Break(
        "npu.overlap is off unless asked for",
        "actors/overlap.py",
        "return self._on and not self.broken",
        "return not self.broken",
        _OVERLAP,
    ),
    Break(
        "overlap ends for good after a failure",
        "actors/overlap.py",
        "return self._on and not self.broken",
        "return self._on",
        _OVERLAP,
    ),
    Break(
        "overlap says that it ended",
        "actors/overlap.py",
        'log.error("npu.overlap: given up until the next start: %s", why)',
        "pass",
        _OVERLAP,
    ),
    Break(
        "the lease waits for the encode beside a decode",
        "actors/overlap.py",
        "                await done.wait()",
        "                pass",
        _OVERLAP,
    ),
)

RESIDENCY = (
    Break(
        "a request's keep_alive is clamped",
        "actors/loads.py",
        "return asked if most < 0 else min(asked, most)",
        "return asked",
        _RESIDENCY,
    ),
    Break(
        "a request's keep_alive has a least value",
        "actors/loads.py",
        "asked = max(asked, models.keep_alive_min_seconds)",
        "pass",
        _RESIDENCY,
    ),
    Break(
        "keep_alive of a model goes before the house's",
        "actors/loads.py",
        "seconds = models.keep_alive_seconds if own is None else own",
        "seconds = models.keep_alive_seconds",
        _RESIDENCY,
    ),
    Break(
        "idle models leave",
        "actors/residency.py",
        'self._nursery.start_soon(self._leave_when_idle, name="idle models")',
        "pass",
        _RESIDENCY,
    ),
    Break(
        "a model that somebody waits for stays",
        "actors/residency.py",
        "if record.name in wanted:",
        "if False:",
        _RESIDENCY,
    ),
    Break(
        "a pinned model does not leave when idle",
        "actors/residency.py",
        "if r.load is None and not r.memo.pinned]",
        "if r.load is None]",
        _RESIDENCY,
    ),
    Break(
        "a pinned model is not swapped out",
        "actors/table.py",
        "        pinned = self._pinned()\n        if pinned is not None and pinned is not record:",
        "        pinned = self._pinned()\n        if False:",
        _RESIDENCY,
    ),
    Break(
        "a pin survives a restart",
        "actors/residency.py",
        "            if pinned:\n                self._begin(record)\n",
        "",
        _RESIDENCY,
    ),
    Break(
        "the least recently used encoders leave first",
        "actors/loads.py",
        "key=lambda r: r.used_at)",
        "key=lambda r: -r.used_at)",
        _RESIDENCY,
    ),
    Break(
        "a load needs what it was seen to take",
        "actors/records.py",
        "max(self._estimate(p, conversations), peaks.get(p.key, 0))",
        "self._estimate(p, conversations)",
        _RESIDENCY,
    ),
    Break(
        "models keep within their budget",
        "actors/memory.py",
        "have = min(have, budget - used)",
        "pass",
        _RESIDENCY,
    ),
    Break(
        "a load that does not fit is refused",
        "actors/memory.py",
        "    if need > have:",
        "    if False:",
        _RESIDENCY,
    ),
    Break(
        "a load counts what conversations may take",
        "actors/room.py",
        "need = record.need(missing, conversations_bytes(settings, engine))",
        "need = record.need(missing, 0)",
        _CACHES,
    ),
    Break(
        "who waits for a load is seen to",
        "actors/scheduler.py",
        'if view.phase == "waiting" and loading(view.model)',
        "if False",
        _RESIDENCY,
    ),
    Break(
        "a load tells how long it will take",
        "actors/loads.py",
        "record.memo.load_seconds[key] = trio.current_time() - record.began",
        "pass",
        _RESIDENCY,
    ),
    Break(
        "drained, the server takes nothing new",
        "actors/scheduler.py",
        "        self.paused = True\n",
        "        pass\n",
        _RELOAD,
    ),
    Break(
        "resumed, it does",
        "actors/scheduler.py",
        '        """Undo ``pause``."""\n        self.paused = False\n',
        '        """Undo ``pause``."""\n',
        _RELOAD,
    ),
    Break(
        "a reload with one wrong key applies nothing",
        "reload.py",
        "            return [], waiting, problems\n",
        "            pass\n",
        _RELOAD,
    ),
    Break(
        "a reload reaches the queue",
        "actors/scheduler.py",
        "        self.gate.adopt(queue)\n",
        "",
        _RELOAD,
    ),
)
