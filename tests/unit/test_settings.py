"""Settings: every mistake is reported, with its key, at once."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, get_type_hints

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rkvlmd import settings
from rkvlmd.errors import SettingsError
from rkvlmd.hosts import is_loopback, split_allow, split_bind

KEYS = [(s, f) for s, cls in settings.SECTIONS.items() for f in dataclasses.fields(cls)]
#: A value of the wrong type, by the type of the setting.
WRONG = {bool: '"yes"', int: "1.5", float: "true", str: "1", tuple: '"a"'}


def kind(section: str, name: str) -> type:
    hint = get_type_hints(settings.SECTIONS[section])[name]
    return getattr(hint, "__origin__", hint)


def problems(text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings.parse(text)
    return caught.value.problems


def test_nothing_is_the_defaults() -> None:
    assert settings.parse("") == settings.Settings()
    assert settings.check(settings.Settings()) == []


def test_the_defaults_are_safe() -> None:
    s = settings.Settings()
    assert is_loopback(split_bind(s.http.bind)[0])
    assert not s.media.remote
    assert not s.media.allow
    assert not s.http.allow_unauthenticated
    assert not s.http.allowed_hosts


def test_every_key_of_the_rendered_file_is_its_default() -> None:
    lines = settings.render().splitlines()
    keys = [line[2:] if line.startswith("# ") and " = " in line else line for line in lines]
    assert settings.parse("\n".join(keys)) == settings.Settings()
    assert settings.parse(settings.render()) == settings.Settings()
    assert sum(" = " in key for key in keys if not key.startswith("#")) == len(KEYS)


@pytest.mark.parametrize(("section", "field"), KEYS, ids=lambda v: getattr(v, "name", v))
def test_every_key_has_a_type_and_says_what_is_wrong(section: str, field: Any) -> None:
    wrong = WRONG[kind(section, field.name)]
    found = problems(f"[{section}]\n{field.name} = {wrong}\n")
    assert len(found) == 1
    assert found[0].startswith(f"{section}.{field.name}: ")


@pytest.mark.parametrize(("section", "field"), KEYS, ids=lambda v: getattr(v, "name", v))
def test_every_number_has_a_least_value_and_a_unit(section: str, field: Any) -> None:
    assert field.metadata["doc"]
    if kind(section, field.name) not in {int, float}:
        return
    least = field.metadata["least"]
    assert least is not None
    assert field.metadata["unit"]
    assert field.default >= least
    found = problems(f"[{section}]\n{field.name} = {type(least)(least - 1)}\n")
    assert found == [f"{section}.{field.name}: must be at least {least} {field.metadata['unit']}"]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_every_bound_is_a_bound(value: str) -> None:
    for section, field in KEYS:
        if kind(section, field.name) is float:
            found = problems(f"[{section}]\n{field.name} = {value}\n")
            assert found == [f"{section}.{field.name}: must be a finite number"]


@given(st.lists(st.sampled_from(KEYS), unique_by=lambda k: (k[0], k[1].name), min_size=1))
def test_all_mistakes_at_once(wrong: list[tuple[str, Any]]) -> None:
    tree: dict[str, list[str]] = {"nonsense": ["a = 1"], "http": ["bnid = 1"]}
    for section, field in wrong:
        line = f"{field.name} = {WRONG[kind(section, field.name)]}"
        tree.setdefault(section, []).append(line)
    text = "\n".join("\n".join([f"[{section}]", *lines]) for section, lines in tree.items())
    found = {problem.partition(": ")[0] for problem in problems(text)}
    assert found == {"nonsense", "http.bnid"} | {f"{s}.{f.name}" for s, f in wrong}


@given(st.text(max_size=100))
def test_any_text_is_settings_or_a_settings_error(text: str) -> None:
    with contextlib.suppress(SettingsError):
        assert isinstance(settings.parse(text), settings.Settings)


def test_not_toml_and_not_a_section() -> None:
    assert problems("[http")[0].startswith("not TOML: ")
    assert problems("http = 1") == ["http: must be a section"]
    assert problems("[[http]]\nbind = 1") == ["http: must be a section"]


def test_types_are_converted() -> None:
    s = settings.parse('[media]\nallow = ["camera.lan:80"]\nfetch_seconds = 3\nremote = true')
    assert s.media.allow == ("camera.lan:80",)
    assert isinstance(s.media.fetch_seconds, float)
    assert s.media.remote is True


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[http]\nbind = "0.0.0.0:8080"', "http.bind"),
        ('[http]\nbind = ":8080"', "http.bind"),
        ('[http]\nbind = "[::]:8080"', "http.bind"),
        ('[http]\nbind = "192.168.1.2:8080"', "http.bind"),
        ('[http]\nbind = "myhost:8080"', "http.bind"),
        ('[http]\nbind = "8080"', "http.bind"),
        ('[http]\nbind = "127.0.0.1:65536"', "http.bind"),
        ('[http]\nbind = "127.0.0.1:x"', "http.bind"),
        ('[log]\nlevel = "loud"', "log.level"),
        ("[engine]\nheal_seconds = 10\nheal_max_seconds = 9", "engine.heal_max_seconds"),
        ("[media]\nmax_image_bytes = 99999999", "media.max_image_bytes"),
        ("[http]\nmax_body_bytes = 999999999", "http.max_body_bytes"),
        ('[media]\nallow = ["192.168.1.50/24"]', "media.allow"),
    ],
)
def test_settings_that_do_not_go_together(text: str, key: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(key + ": ")


@pytest.mark.parametrize(
    "text",
    [
        '[http]\nbind = "localhost:0"',
        '[http]\nbind = "[::1]:8080"',
        '[http]\nbind = "127.5.5.5:1"',
        '[http]\nbind = "0.0.0.0:80"\nallow_unauthenticated = true',
        '[http]\nbind = "[::]:80"\napi_keys_file = "/etc/rkvlmd/keys"',
    ],
)
def test_binds_that_are_fine(text: str) -> None:
    settings.parse(text)


@pytest.mark.parametrize(
    ("entry", "where", "port"),
    [
        ("192.168.1.50/32:8123", "192.168.1.50/32", 8123),
        ("192.168.1.50", "192.168.1.50/32", None),
        ("10.0.0.0/8", "10.0.0.0/8", None),
        ("fd00::/8", "fd00::/8", None),
        ("[fd00::/8]:443", "fd00::/8", 443),
        ("[fd00::1]", "fd00::1/128", None),
        ("Camera.LAN.", "camera.lan", None),
        ("camera_1.lan:80", "camera_1.lan", 80),
        ("localhost:65535", "localhost", 65535),
    ],
)
def test_entries_of_media_allow(entry: str, where: str, port: int | None) -> None:
    found, number = split_allow(entry)
    assert (str(found), number) == (where, port)


@pytest.mark.parametrize(
    "entry",
    [
        "", ":80", "*", "*.lan", "http://camera.lan", "camera.lan/", "camera.lan:", "camera.lan:0",
        "camera.lan:65536", "camera.lan:x", "10.0.0.1/8", "10.0.0.0/33", "256.1.1.1", "127.1",
        "0x7f.0.0.1", "[fd00::/8", "[camera.lan]:80", "[10.0.0.1]:80", "fd00::/8:80", "a b", "a..b",
    ],
)  # fmt: skip
def test_entries_that_are_wrong(entry: str) -> None:
    with pytest.raises(ValueError, match=r"must|brackets"):
        split_allow(entry)
