"""Which settings a running daemon takes over, and how two sets of settings differ."""

from __future__ import annotations

from dataclasses import fields, replace

from rkvlmd.sections import Settings

#: Read each time they are used, or handed on by ``House.adopt``. Every other key needs a restart.
LIVE: frozenset[str] = frozenset(
    f"{section}.{name}"
    for section, names in {
        "http": "max_body_bytes max_json_depth max_json_values max_parts body_seconds"
        " discard_bytes discard_seconds headers_seconds ping_seconds",
        "control": "max_connections max_line_bytes peer_seconds idle_seconds",
        "models": "default on_demand max_tokens keep_alive_seconds keep_alive_min_seconds"
        " keep_alive_max_seconds",
        "media": "remote allow max_images max_image_bytes max_pixels min_side max_aspect"
        " fetch_seconds max_redirects exact",
        "prep": "children idle_seconds memory_bytes job_seconds prompt_wait_seconds",
        "queue": "max_jobs max_jobs_per_client max_bytes max_pixels max_embedding_bytes job_seconds refuse_late age_seconds"
        " max_jumps interactive_clients batch_clients drain_retry_seconds",
        "engine": "hello_seconds load_seconds load_bytes_per_second beat_seconds"
        " first_token_seconds token_seconds abort_seconds encode_seconds grace_seconds restarts"
        " heal_seconds heal_max_seconds",
        "memory": "reserve_bytes models_bytes check_seconds",
        "log": "level",
    }.items()
    for name in names.split()
)


def changes(running: Settings, wanted: Settings) -> tuple[Settings, list[str], list[str]]:
    """Return ``running`` with what can be taken over, the keys that were, and those that wait.

    Keys are ``section.key``, in the order of the settings.
    """
    merged, applied, waiting = running, [], []
    for section in fields(Settings):
        old, new = getattr(running, section.name), getattr(wanted, section.name)
        taken = {}
        for option in fields(old):
            value = getattr(new, option.name)
            if value == getattr(old, option.name):
                continue
            key = f"{section.name}.{option.name}"
            if key in LIVE:
                taken[option.name] = value
                applied.append(key)
            else:
                waiting.append(key)
        if taken:
            merged = replace(merged, **{section.name: replace(old, **taken)})
    return merged, applied, waiting
