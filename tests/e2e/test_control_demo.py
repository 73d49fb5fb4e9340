"""``rkvlmd demo`` with a daemon that answers from a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rkvlmd import demo

pytestmark = pytest.mark.process
DAEMON = Path(__file__).parents[1] / "fakes" / "demo_daemon.py"
RUN = (
    "import sys; from pathlib import Path; from rkvlmd import demo;"
    "sys.exit(demo.main(Path(sys.argv[1]), [sys.executable, *sys.argv[2:]]))"
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    for name in ("a.png", "b.png"):
        (path / name).write_bytes(b"\x89PNG" + name.encode())
    write_index(
        path,
        [
            {"files": ["a.png"], "questions": ["What is it?", "And what colour?"]},
            {"files": ["a.png", "b.png"], "questions": ["What is different?"]},
        ],
    )
    return path


def write_index(path, value):
    (path / "index.json").write_text(value if isinstance(value, str) else json.dumps(value))


def run(folder, tmp_path, mode="good"):
    """Run the demo as a process of its own; return it and what its daemon was asked."""
    record, scratch = tmp_path / "record", tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(DAEMON), str(record), mode],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TMPDIR": str(scratch)},
        start_new_session=True,
    )
    assert list(scratch.iterdir()) == []
    asked = record.read_text().splitlines() if record.exists() else []
    return done, [json.loads(line) for line in asked]


def test_it_shows_pictures_questions_answers_and_times(folder, tmp_path):
    done, asked = run(folder, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "a.png" in lines
    assert "a.png and b.png" in lines
    assert lines.count("> A red star.") == 3
    assert "look 12 ms, first token after 20 ms, total 500 ms" in lines
    first, second, third = (body["messages"] for body in asked)
    assert [part["type"] for part in first[0]["content"]] == ["image_url", "text"]
    assert second[:2] == [first[0], {"role": "assistant", "content": "A red star."}]
    assert second[2] == {"role": "user", "content": "And what colour?"}
    assert [part["type"] for part in third[0]["content"]] == ["image_url", "image_url", "text"]
    assert all(body["temperature"] == 0 for body in asked)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("error", "the child died"),
        ("silent", "said nothing"),
        ("broken", "models.dir: cannot be read"),
        ("mute", "'hello' instead of its address"),
        ("bad-end", "status 9"),
    ],
)
def test_it_says_what_went_wrong(folder, tmp_path, mode, says):
    done, _ = run(folder, tmp_path, mode)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_clean(folder, tmp_path):
    done, _ = run(folder, tmp_path, "interrupted")
    assert done.returncode == 130
    assert done.stderr == "\nrkvlmd demo: interrupted\n"


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("not JSON", "cannot be read"),
        ([], "must be a list"),
        ({}, "must be a list"),
        ([3], r"\[0\]\.files"),
        ([{"files": ["a.png"], "questions": []}], r"\[0\]\.questions"),
        ([{"files": ["a.png"], "questions": [3]}], r"\[0\]\.questions"),
        ([{"files": ["c.png"], "questions": ["x"]}], r"no picture c\.png"),
        ([{"files": ["../index.json"], "questions": ["x"]}], "no picture"),
    ],
)
def test_a_bad_index_is_refused(folder, index, says):
    write_index(folder, index)
    with pytest.raises(demo.DemoError, match=says):
        demo.read_index(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(demo.DemoError, match="cannot be read"):
        demo.read_index(tmp_path / "none")


@pytest.mark.parametrize("timings", [None, [], {}, {"encode": "x"}])
def test_stages_without_figures(timings):
    assert demo.stages(timings) == ""


def test_stages_that_did_not_run_are_left_out():
    assert demo.stages({"fetch": 0, "load": 12.5, "generate": 0.25, "other": 3}) == (
        "load model 12.5 s, answer 250 ms"
    )
