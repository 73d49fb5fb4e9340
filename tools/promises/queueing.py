"""Admission and order."""

from __future__ import annotations

from tools.promises.change import Break

_QUEUE = "tests/actors/test_queue.py"
_POLICY = "tests/actors/test_policy.py"
_CACHES = "tests/actors/test_caches.py"
_RELAY = "tests/actors/test_relay.py"
_HTTP = "tests/e2e/test_http_bodies.py tests/e2e/test_http_chat.py"

ADMISSION = (
    Break(
        "requests have a ceiling",
        "actors/slots.py",
        "if self.jobs >= self._settings.max_jobs:",
        "if False:",
        _HTTP,
    ),
    Break(
        "a slot is taken before the body is read",
        "front/http/intake.py",
        "    slot = house.scheduler.reserve(exchange.client, size)\n    try:\n"
        "        pieces = await _body(exchange, deadline)\n",
        "    pieces = await _body(exchange, deadline)\n"
        "    slot = house.scheduler.reserve(exchange.client, size)\n    try:\n",
        _HTTP,
    ),
    Break(
        "bytes have a ceiling",
        "actors/slots.py",
        "if more > 0 and self.bytes + more > self._settings.max_bytes:",
        "if False:",
        f"{_CACHES} {_HTTP}",
    ),
    Break(
        "pixels have a ceiling",
        "actors/slots.py",
        "if self.pixels + pixels > most:",
        "if False:",
        _CACHES,
    ),
    Break(
        "one request's pixels have a ceiling",
        "actors/slots.py",
        "if slot.pixels + pixels > most:",
        "if False:",
        _CACHES,
    ),
    Break(
        "pixels are given back",
        "actors/slots.py",
        "        self.pixels -= slot.pixels\n",
        "",
        _CACHES,
    ),
    Break(
        "a download counts while it is held",
        "actors/prepare.py",
        "    job.count_bytes(len(data))\n",
        "",
        _CACHES,
    ),
    Break(
        "embeddings of one request have a ceiling",
        "actors/checks.py",
        "    if size > most:",
        "    if False:",
        _CACHES,
    ),
    Break(
        "one client holds its share and no more",
        "actors/slots.py",
        "if 0 < most <= held:",
        "if False:",
        f"{_QUEUE} {_HTTP} tests/e2e/test_http_guard.py",
    ),
    Break(
        "Retry-After is 1 to 120 seconds",
        "actors/slots.py",
        "return max(1, min(120, math.ceil(estimate)))",
        "return math.ceil(estimate)",
        "tests/actors/test_small_parts.py",
    ),
    Break(
        "Retry-After follows the measured rate",
        "actors/slots.py",
        "self.service_seconds += 0.2 * (seconds - self.service_seconds)",
        "pass",
        _QUEUE,
    ),
    Break(
        "what would be late is refused at once",
        "actors/slots.py",
        "if not self._settings.refuse_late or not self.measured or start < seconds:",
        "if True:",
        _QUEUE,
    ),
    Break(
        "queue.refuse_late turns that off",
        "actors/slots.py",
        "if not self._settings.refuse_late or not self.measured",
        "if not self.measured",
        _QUEUE,
    ),
    Break(
        "timeout in the body is a deadline",
        "actors/scheduler.py",
        "seconds = min(seconds, request.timeout)",
        "pass",
        f"{_QUEUE} {_HTTP}",
    ),
    Break(
        "X-Request-Deadline is a deadline",
        "front/http/intake.py",
        "request = dataclasses.replace(request, timeout=left)",
        "pass",
        _HTTP,
    ),
    Break(
        "X-Priority goes before the body",
        "front/http/intake.py",
        "return request if asked is None else dataclasses.replace(request, priority=asked)",
        "return request",
        _HTTP,
    ),
)

ORDER = (
    Break(
        "classes: the better one is served first",
        "actors/policy.py",
        "    best = min(lines)\n",
        "    best = max(lines)\n",
        _POLICY,
    ),
    Break(
        "age lifts a class",
        "actors/policy.py",
        "if view.now - oldest >= (rank - best) * view.rules.age_seconds:",
        "if False:",
        _POLICY,
    ),
    Break(
        "age lifts only after its time",
        "actors/policy.py",
        "if view.now - oldest >= (rank - best) * view.rules.age_seconds:",
        "if True:",
        _POLICY,
    ),
    Break(
        "clients take turns inside a class",
        "actors/policy.py",
        "rounds[line] = number = rounds.get(line, -1) + 1",
        "rounds[line] = number = 0",
        _POLICY,
    ),
    Break(
        "nobody waits for who was served since it came",
        "actors/policy.py",
        "key = max(history.lines.get(line, 0), ticket.arrived - 0.5)",
        "key = history.lines.get(line, 0)",
        _POLICY,
    ),
    Break(
        "jumps are bounded",
        "actors/policy.py",
        "if ticket.overtaken >= view.rules.max_jumps or best_affinity == _MOST:",
        "if best_affinity == _MOST:",
        _POLICY,
    ),
    Break(
        "two models do not thrash",
        "actors/policy.py",
        "in view.warm else 1",
        "in view.warm else 0",
        _POLICY,
    ),
    Break(
        "a worse class never jumps",
        "actors/policy.py",
        "if ticket.rank == best_rank and (near := affinity(ticket, view)) > best_affinity:",
        "if (near := affinity(ticket, view)) > best_affinity:",
        _POLICY,
    ),
    Break(
        "the work is conserved",
        "actors/lease.py",
        "        if self._waiting:\n            self._give()\n",
        "",
        "tests/actors/test_lease.py",
    ),
    Break(
        "a request's own class counts",
        "actors/clients.py",
        "        if asked is not None:\n",
        "        if False:\n",
        "tests/unit/test_urgency.py",
    ),
    Break(
        "the owner's lists of clients decide",
        "actors/clients.py",
        "        if self._batch and is_client(client, self._batch):\n            return BATCH\n",
        "",
        "tests/unit/test_urgency.py",
    ),
    Break(
        "the NPU is free before the next one has it",
        "actors/lease.py",
        "            if grip.begun is not None:\n                await grip.begun.settle()\n",
        "            pass\n",
        _RELAY,
    ),
    Break(
        "an order that nobody awaits is not sent",
        "actors/relay.py",
        "not (self.sent or self._job.scope.cancel_called)",
        "not self.sent",
        _RELAY,
    ),
    Break(
        "the next encode waits for no task",
        "actors/pipeline.py",
        "        grip.release()\n",
        "        pass\n",
        _RELAY,
    ),
    Break(
        "the lease waits for nobody's pictures",
        "actors/relay.py",
        " or not tools.prep.idle:",
        ":",
        _RELAY,
    ),
    Break(
        "a prompt that may be too long gets no encode",
        "actors/relay.py",
        "tokens >= entry.manifest.decoder.context",
        "False",
        _RELAY,
    ),
)
