"""The real daemon makes embeddings and looks at videos; the client is ``openai``'s."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from onnx import TensorProto
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers import models as words

from rkvlmd.models import manifest as manifests
from tests.e2e.daemon import Daemon, png, running
from tests.fakes import videos
from tests.fakes.tiny_model import make_model
from tools.exporter.graph import Graph

pytestmark = pytest.mark.process
SIZE = 64


def entry(folder: Path, name: str) -> dict[str, str]:
    return {"file": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}


def change(folder: Path, **top: Any) -> None:
    """Replace top-level keys of a manifest."""
    path = folder / manifests.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **top}))


def make_clip(folder: Path) -> None:
    """Write a model of two towers: a picture is its mean colour, a text one of three colours."""
    folder.mkdir()
    g = Graph("text")
    ids = g.input("input_ids", ["batch", "places"], TensorProto.INT64)
    table = np.zeros((5, 3), np.float32)
    table[2:5] = np.eye(3, dtype=np.float32)
    rows = g.add("Gather", g.weight("table", table), ids)
    g.add("ReduceSum", rows, g.ints(1), out="text_embeds", keepdims=0)
    g.output("text_embeds", ["batch", 3])
    g.save(folder / "text.onnx")
    g = Graph("vision")
    pixels = g.input("pixel_values", [1, 3, 16, 16])
    mean = g.add("ReduceMean", pixels, axes=[2, 3], keepdims=0)
    g.add("Identity", mean, out="image_embeds")
    g.output("image_embeds", [1, 3])
    g.save(folder / "vision.onnx")
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "red": 2, "green": 3, "blue": 4}
    tokenizer = Tokenizer(words.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|startoftext|>", "<|endoftext|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = {
        "schema": 1,
        "name": "clip",
        "family": "clip",
        "encoders": [
            {"engine": "onnx", **entry(folder, "vision.onnx"), "width": 16, "height": 16,
             "tokens": 1, "embedding": 3},
        ],
        "decoder": {
            "engine": "tower", "files": {"text": entry(folder, "text.onnx")}, "context": 8,
            "embedding": 3,
        },
        "tokenizer": entry(folder, "tokenizer.json"),
        "embeddings": {"inputs": ["text", "image"], "pictures": "rows"},
        "capabilities": ["image", "embeddings"],
    }  # fmt: skip
    (folder / manifests.FILE).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("models")
    made = make_model(folder / "tiny", name="tiny", hidden=True)
    make_model(folder / "plain", name="plain", layers=1)
    make_model(folder / "single", name="single", layers=1)
    change(folder / "single", capabilities=["image"])
    raw = folder / "raw"
    make_model(raw, name="raw", hidden=True, layers=1)
    (raw / "embed.jinja").write_text(
        "{% for m in messages %}{% for p in m['content'] %}"
        "{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}{% endfor %}"
    )
    how = {"template": entry(raw, "embed.jinja"), "pool": "mean", "shorter": True,
           "normalise": False}  # fmt: skip
    change(raw, embeddings=how)
    make_clip(folder / "clip")
    assert made.embeddings is not None
    tmp = tmp_path_factory.mktemp("daemon")
    with running(tmp, folder, config="[media]\nmax_frames = 4\n") as started:
        yield started


@pytest.fixture
def api(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=daemon.url + "/v1", api_key="x", max_retries=0, timeout=120
    ) as client:
        yield client


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def picture(colour: tuple[int, int, int]) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png(colour)}}


def film(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


# --- embeddings ----------------------------------------------------------------------


def test_texts_through_the_openai_client(api: openai.OpenAI) -> None:
    alone = api.embeddings.create(model="tiny", input="a red circle")
    both = api.embeddings.create(model="tiny", input=["a red circle", "nothing at all"])
    floats = api.embeddings.create(model="tiny", input="a red circle", encoding_format="float")
    first, second = (item.embedding for item in both.data)
    assert [item.index for item in both.data] == [0, 1]
    assert len(first) == SIZE
    assert math.isclose(sum(v * v for v in first), 1.0, abs_tol=1e-5)
    assert np.allclose(first, alone.data[0].embedding, atol=1e-6)
    assert np.allclose(first, floats.data[0].embedding, atol=1e-6)
    assert np.abs(np.subtract(first, second)).max() > 1e-3
    assert both.usage.prompt_tokens == both.usage.total_tokens > alone.usage.prompt_tokens > 0
    assert alone.model == "tiny"


def test_pictures_are_read_by_the_decoder(daemon: Daemon) -> None:
    def embed(*parts: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(
            daemon.url + "/v1/embeddings", json={"model": "tiny", "input": list(parts)}, timeout=120
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        assert len(found["data"]) == 1
        return found

    red, again = embed(picture((200, 0, 0)), text("?")), embed(picture((200, 0, 0)), text("?"))
    blue = embed(picture((0, 0, 200)), text("?"))
    assert red["usage"]["prompt_tokens_details"]["image_tokens"] == 4
    vector, other = red["data"][0]["embedding"], blue["data"][0]["embedding"]
    assert np.allclose(vector, again["data"][0]["embedding"], atol=1e-6)
    assert np.abs(np.subtract(vector, other)).max() > 1e-4


def test_a_template_of_its_own_and_fewer_dimensions(api: openai.OpenAI) -> None:
    whole = api.embeddings.create(model="raw", input="a b c")
    short = api.embeddings.create(model="raw", input="a b c", dimensions=8)
    assert len(short.data[0].embedding) == 8
    assert np.allclose(whole.data[0].embedding[:8], short.data[0].embedding, atol=1e-6)
    # The text alone, without a word of the chat template.
    assert whole.usage.prompt_tokens <= 5
    assert not math.isclose(np.linalg.norm(whole.data[0].embedding), 1.0, abs_tol=1e-3)


def test_two_towers_meet_in_one_space(daemon: Daemon) -> None:
    given = [[text("red")], [picture((255, 0, 0))], "blue", [picture((0, 0, 255))]]
    answer = httpx.post(
        daemon.url + "/v1/embeddings",
        json={"model": "clip", "input": given, "encoding_format": "base64"}, timeout=120,
    ).json()  # fmt: skip
    found = [struct.unpack("<3f", base64.b64decode(d["embedding"])) for d in answer["data"]]
    assert np.allclose(found, [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]], atol=1e-3)
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 2


@pytest.mark.parametrize(
    ("model", "given", "param", "said"),
    [
        ("plain", "a", "model", "makes no embeddings"),
        ("clip", [text("red"), picture((1, 1, 1))], "input[0]", "one text or one picture"),
        ("clip", [picture((1, 1, 1)), picture((1, 1, 1))], "input[0]", "one text or one picture"),
        ("clip", ["red", "red " * 9], "input[1]", "the model's context holds 8"),
        ("raw", [picture((1, 1, 1))], "input[0]", "of texts alone"),
        ("tiny", [picture((1, 1, 1)), {"type": "image_url", "image_url": "data:;base64,AAAA"}],
         "input[1].image_url", "no JPEG"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_embed(
    daemon: Daemon, model: str, given: Any, param: str, said: str
) -> None:
    answer = httpx.post(
        daemon.url + "/v1/embeddings", json={"model": model, "input": given}, timeout=120
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert said in error["message"]


def test_dimensions_that_a_model_does_not_offer(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="have 64 dimensions") as error:
        api.embeddings.create(model="tiny", input="a", dimensions=8)
    assert (error.value.code, error.value.param) == ("unsupported_parameter", "dimensions")
    api.embeddings.create(model="tiny", input="a", dimensions=SIZE)


def test_a_model_of_towers_writes_no_text(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings alone"):
        api.chat.completions.create(model="clip", messages=[{"role": "user", "content": "red"}])


def test_embedding_leaves_the_conversation_in_the_cache(api: openai.OpenAI) -> None:
    def cached() -> int:
        said = api.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello there"}], max_tokens=2
        )
        assert said.usage is not None
        assert said.usage.prompt_tokens_details is not None
        return said.usage.prompt_tokens - (said.usage.prompt_tokens_details.cached_tokens or 0)

    cached()
    api.embeddings.create(model="tiny", input="something else")
    assert cached() == 1


# --- videos and several pictures -----------------------------------------------------


def chat(daemon: Daemon, model: str, *parts: dict[str, Any]) -> httpx.Response:
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": list(parts)}]}
    return httpx.post(daemon.url + "/v1/chat/completions", json=body, timeout=120)


def images(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["prompt_tokens_details"]["image_tokens"]
    return found


def test_frames_of_a_video_are_pictures_at_its_place(daemon: Daemon) -> None:
    for url in (
        videos.uri(videos.film(count=41)),
        videos.uri(videos.film("webm", "libvpx", count=41), "video/webm"),
        videos.uri(videos.gif(9), "image/gif"),
        videos.frames_uri([videos.jpeg(20 * i) for i in range(10)]),
    ):
        answer = chat(daemon, "tiny", text("What moves?"), film(url))
        assert images(answer) == 4 * 4, "media.max_frames frames of four tokens"
    two = chat(daemon, "tiny", film(videos.uri(videos.film(count=2))), picture((1, 2, 3)))
    assert images(two) == 3 * 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (videos.sound(), "holds no video"),
        (videos.film(count=3, rate=1, times=[0, 1, 36_000]), "36001 s long; the limit is 900 s"),
        (videos.film()[:900], "damaged or cut off MP4"),
        (b"not a video", "is no MP4, WebM or GIF"),
    ],
)
def test_a_bad_video_names_its_field(daemon: Daemon, data: bytes, said: str) -> None:
    answer = chat(daemon, "tiny", text("What?"), film(videos.uri(data)))
    error = answer.json()["error"]
    field = "messages[0].content[1].video_url"
    assert (answer.status_code, error["param"]) == (400, field), error
    assert said in error["message"]
    assert field in error["message"]


def test_a_model_for_one_picture_does_not_mix_two(daemon: Daemon) -> None:
    answer = chat(daemon, "single", picture((9, 9, 9)), picture((1, 1, 1)))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "too_many_images")
    assert error["param"] == "messages[0].content[1].image_url"
    assert "takes one picture at a time" in error["message"]
    answer = chat(daemon, "single", film(videos.uri(videos.film())))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0].video_url"
    assert images(chat(daemon, "single", picture((9, 9, 9)))) == 4
