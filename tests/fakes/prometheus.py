"""Reads Prometheus's text format 0.0.4, and refuses what is not quite it."""

from __future__ import annotations

import re

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
_SAMPLE = re.compile(rf"({NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (\+Inf|[0-9.e+-]+)")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}

Samples = dict[str, float]


def parse(page: bytes) -> Samples:
    """Return each sample's value by its name and labels as written.

    Checks that every metric has one head of HELP and TYPE, its samples right
    after it and none twice, and that histograms add up.
    """
    lines = page.decode().split("\n")
    assert lines.pop() == "", "the last line must end"
    samples: Samples = {}
    seen: set[str] = set()
    name = kind = ""
    rest = iter(lines)
    for line in rest:
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert re.fullmatch(NAME, name)
            assert name not in seen, f"{name} comes twice"
            seen.add(name)
            told = next(rest).split()
            assert told[:3] == ["#", "TYPE", name]
            kind = told[3]
            continue
        match = _SAMPLE.fullmatch(line)
        assert match, line
        suffixes = _SUFFIXES.get(kind, ("",))
        assert match[1] in [name + suffix for suffix in suffixes], line
        assert kind != "counter" or name.endswith("_total"), line
        key = line.rpartition(" ")[0]
        assert key not in samples, key
        samples[key] = float(match[3])
    for key, value in samples.items():
        if 'le="+Inf"' in key:
            whole = re.sub(r',?le="\+Inf"', "", key).replace("_bucket", "_count").replace("{}", "")
            assert samples[whole] == value, key
    _cumulative(samples)
    return samples


def _cumulative(samples: Samples) -> None:
    before: tuple[str, float] = ("", 0.0)
    for key, value in samples.items():
        if "_bucket" in key:
            series = re.sub(r'le="[^"]*"', "", key)
            assert series != before[0] or value >= before[1], key
            before = (series, value)
