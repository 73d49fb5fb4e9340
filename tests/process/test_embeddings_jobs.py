"""Jobs of ``/v1/embeddings``, and videos, through the real actors and real children."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from rkvlmd.actors import prepare, vectors
from rkvlmd.actors import videos as videos_of_jobs
from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.job import Job
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import (
    ChatRequest,
    EmbeddingsRequest,
    Ended,
    PicturePart,
    PictureSource,
    TextPart,
    Turn,
    VideoPart,
    VideoSource,
)
from rkvlmd.models import catalog
from rkvlmd.models import manifest as manifests
from tests.fakes import videos
from tests.fakes.scripted import (
    PNG,
    SHORT,
    Scripts,
    chat,
    collect,
    make_model,
    open_house,
    submit,
    until_phase,
    waits,
)

pytestmark = pytest.mark.process


def inputs(*texts: str, picture: bool = False, **more: Any) -> EmbeddingsRequest:
    turns = tuple(Turn("user", (TextPart(text),)) for text in texts)
    sources: tuple[PictureSource, ...] = ()
    if picture:
        sources = (PictureSource("base64", PNG, "input[0].image_url"),)
        turns = (Turn("user", (PicturePart(0),)), *turns)
    return EmbeddingsRequest(turns=turns, pictures=sources, **more)


def film(data: bytes, text: str = "?") -> Any:
    source = VideoSource("base64", base64.b64encode(data).decode(), "messages[0].content[0].video")
    request = chat(text)
    turn = Turn("user", (VideoPart(0), TextPart(text)))
    return type(request)(turns=(turn,), videos=(source,))


async def made(job: Job) -> tuple[list[tuple[float, ...]], Ended]:
    with trio.fail_after(30):
        text, end = await collect(job)
    lines = [base64.b64decode(line) for line in text.split("\n")[:-1]]
    return [struct.unpack(f"<{len(line) // 4}f", line) for line in lines], end


async def left_clean(house: Any) -> None:
    with trio.fail_after(30):
        await house.scheduler.wait_empty()
    gate = house.scheduler.gate
    assert gate.jobs == gate.bytes == gate.pixels == 0
    assert not house.tools.lease.held


async def test_every_input_has_its_vector(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        found, end = await made(submit(house, inputs("a", "bb", picture=True)))
        assert end.reason == "stop", end
        assert [len(vector) for vector in found] == [8, 8, 8]
        # The last token of each is the template's.
        assert len(set(found)) == 1
        lengths = [len("[user]") + n + 1 for n in (4, 1, 2)]
        assert (end.usage.prompt_tokens, end.usage.image_tokens) == (sum(lengths), 4)
        assert end.timings.first_token == 0.0
        await left_clean(house)
    assert Blob.live == 0


@pytest.mark.parametrize(
    ("kind", "times", "reason"),
    [("kill", 1, "stop"), ("kill", 2, "engine_died"), ("error", 1, "error"),
     ("hang", 1, "engine_wedged")],
)  # fmt: skip
async def test_faults(tmp_path: Path, kind: str, times: int, reason: str) -> None:
    fault = {"at": "embed", "kind": kind, "times": times, "file": str(tmp_path / "count")}
    async with open_house(tmp_path, scripts=Scripts({}, {"fault": fault}, {})) as house:
        with waits(house, **SHORT if kind == "hang" else {}):
            found, end = await made(submit(house, inputs("a", "b", picture=True)))
        assert end.reason == reason
        if reason == "stop":
            assert len(found) == 3
        if times == 2:
            _, again = await made(submit(house, inputs("a", "b", picture=True)))
            assert again.error is not None
            assert again.error.code == "engine_crash"
        good, end = await made(submit(house, inputs("fine")))
        assert (len(good), end.reason) == (1, "stop")
        await left_clean(house)
    assert Blob.live == 0


async def test_a_client_that_leaves_hears_it_at_once_and_the_engine_is_joined(
    tmp_path: Path,
) -> None:
    async with open_house(tmp_path, scripts=Scripts({}, {"embed_seconds": 0.5}, {})) as house:
        job = submit(house, inputs(*["text"] * 60))
        await until_phase(house, job, "prefill")
        job.abandon("client_gone")
        assert job.outbox.end is not None
        assert house.tools.lease.held, "the engine still works"
        started = trio.current_time()
        await left_clean(house)
        assert trio.current_time() - started < 20, "one input was finished, not sixty"
        found, _ = await made(submit(house, inputs("b")))
        assert len(found) == 1


async def test_others_get_a_turn_between_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "TURN_SECONDS", 0.0)
    async with open_house(tmp_path, scripts=Scripts({}, {"embed_seconds": 0.2}, {})) as house:
        long = submit(house, inputs(*["text"] * 40))
        await until_phase(house, long, "prefill")
        with trio.fail_after(30):
            text, _ = await collect(submit(house, chat(), client="10.0.0.2"))
        assert text
        assert long.outbox.end is None, "the chat did not wait for forty inputs"
        long.abandon("cancelled")
        await left_clean(house)


async def test_the_answer_is_paid_for(tmp_path: Path) -> None:
    async with open_house(tmp_path, queue={"max_bytes": 10_000}) as house:
        _, end = await made(submit(house, inputs(*["a"] * 400)))
        assert end.error is not None
        assert end.error.code == "server_is_overloaded"
        await left_clean(house)


async def test_frames_of_a_video(tmp_path: Path) -> None:
    script = {"mode": "echo"}
    limits = {"max_frames": 5}
    async with open_house(tmp_path, scripts=Scripts({}, script, {}), media=limits) as house:
        for data in (videos.film(count=30), videos.gif(9)):
            with trio.fail_after(30):
                text, end = await collect(submit(house, film(data)))
            assert text.startswith("pictures=5 "), end
            assert end.usage.image_tokens == 20
        await left_clean(house)
    assert Blob.live == 0


async def test_no_more_frames_than_the_manifest_says(tmp_path: Path) -> None:
    async with open_house(tmp_path, scripts=Scripts({}, {"mode": "echo"}, {})) as house:
        data = [videos.jpeg(i) for i in range(30)]
        text = ",".join(base64.b64encode(frame).decode() for frame in data)
        source = VideoSource("frames", text, "v")
        request = type(chat())(turns=(Turn("user", (VideoPart(0),)),), videos=(source,))
        said, end = await collect(submit(house, request))
        # manifest.video_frames is 8 unless said otherwise
        assert said.startswith("pictures=8 "), end


@pytest.mark.parametrize("kind", ["kill", "hang"])
async def test_a_video_that_kills_its_children_is_refused(tmp_path: Path, kind: str) -> None:
    fault = {"at": "video", "kind": kind, "times": 9}
    times = {"job_seconds": 2.0}
    async with open_house(tmp_path, scripts=Scripts({}, {}, {"fault": fault}), prep=times) as house:
        request = film(videos.gif(3))
        codes = []
        for _ in range(4):
            with trio.fail_after(30):
                _, end = await collect(submit(house, request))
            assert isinstance(end.error, RkvlmdError)
            codes.append(end.error.code)
        assert codes[0] == "engine_died"
        assert codes[-1] == "engine_crash"
        await left_clean(house)
    assert Blob.live == 0


async def test_a_bad_video_ends_the_job_with_its_field(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        with trio.fail_after(30):
            _, end = await collect(submit(house, film(b"nothing of the kind")))
        assert end.error is not None
        assert end.error.param == "messages[0].content[0].video"
        assert "no MP4, WebM or GIF" in end.error.message
        await left_clean(house)
    assert Blob.live == 0


async def test_a_video_is_fetched_within_its_own_limit(tmp_path: Path) -> None:
    data = videos.film(count=30)
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(data)}\r\n\r\n".encode()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            assert (await stream.receive_some(4096)).startswith(b"GET /a.mp4 ")
            await stream.send_all(head + data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, serve, 0, host="127.0.0.1")  # type: ignore[arg-type]
        )
        port = listeners[0].socket.getsockname()[1]
        request = ChatRequest(
            turns=(Turn("user", (VideoPart(0),)),),
            videos=(VideoSource("url", f"http://127.0.0.1:{port}/a.mp4", "v"),),
        )
        # A picture of this size would be refused; a video is not.
        media = {"remote": True, "allow": (f"127.0.0.1:{port}",), "max_image_bytes": 2000}
        echo = Scripts({}, {"mode": "echo"}, {})
        for most, code in ((len(data), None), (len(data) - 1, "image_file_too_large")):
            folder = tmp_path / str(most)
            media["max_video_bytes"] = most
            async with open_house(folder, scripts=echo, media=media) as house:
                with trio.fail_after(30):
                    text, end = await collect(submit(house, request))
                if code is None:
                    assert text.startswith("pictures=8 "), end
                else:
                    assert end.error is not None
                    assert (end.error.code, end.error.param) == (code, "v")
                    assert "the video file is larger" in end.error.message
                await left_clean(house)
        nursery.cancel_scope.cancel()
    assert Blob.live == 0


async def test_a_library_that_mixes_pictures_is_found_out_by_the_load(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "models")
    path = folder / "rkvlm.json"
    manifest = json.loads(path.read_text())
    files = {"model": manifest["decoder"]["files"]["decoder"]}
    manifest["decoder"] |= {"engine": "rkllm", "files": files, "multi_image_from": "1.3.0"}
    path.write_text(json.dumps(manifest))
    old = {"mode": "echo", "info": {"libraries": {"librkllmrt": "1.2.3"}}}
    async with open_house(tmp_path, scripts=Scripts({}, old, {})) as house:
        # The first one waits for the load, the second is refused without any work.
        for phase in ("loading", "admitted"):
            job = submit(house, chat("x", pictures=2))
            with trio.fail_after(30):
                _, end = await collect(job)
            assert end.error is not None
            assert (end.error.code, end.error.status) == ("too_many_images", 400)
            assert "from version 1.3.0 of the RKLLM library on" in end.error.message
            assert job.ended_in == phase
        with trio.fail_after(30):
            text, end = await collect(submit(house, chat("x", pictures=1)))
        assert text.startswith("pictures=1 "), end
        # Each input of embeddings is a prompt of its own.
        pictures = tuple(PictureSource("base64", PNG, f"input[{i}].image_url") for i in range(2))
        turns = tuple(Turn("user", (PicturePart(i),)) for i in range(2))
        found, end = await made(submit(house, EmbeddingsRequest(turns=turns, pictures=pictures)))
        assert len(found) == 2, end
        await left_clean(house)
    assert Blob.live == 0


def laid(tokens: int, name: str) -> prepare.Picture:
    view = prepare.View(None, name, 0, tokens)  # type: ignore[arg-type]
    return prepare.Picture((view,), ("", 0, ""), name)


def test_the_frames_of_a_video_become_one_place(tmp_path: Path) -> None:
    tags = manifests.Tags(start="<v>", content="*", end="</v>")
    entries, _ = catalog.scan(make_model(tmp_path / "models").parent, demo=False)
    (entry,) = entries.values()
    decoder = msgspec.structs.replace(entry.manifest.decoder, engine="rkllm")
    manifest = msgspec.structs.replace(entry.manifest, video=tags, decoder=decoder)
    entry = replace(entry, manifest=manifest)
    job = Job("j", "c", chat(), 0.0, 0.0)
    given = [laid(4, "p"), *(laid(2, f"f{i}") for i in range(4))]
    found = videos_of_jobs.grouped(job, given, videos_of_jobs.Frames({}, (2, 2)), entry)
    assert [picture.video for picture in found] == [None, 0, 1]
    assert [view.key for view in found[2].views] == ["f2", "f3"]
    assert found[1].layout == ("<v>", 0, 1, "</v>")
    assert found[1].tokens == 4
    # As pictures they must be of one size there.
    with pytest.raises(RkvlmdError, match="have 2 and 4 tokens; ask for the same detail"):
        videos_of_jobs.grouped(job, given, videos_of_jobs.Frames(), entry)


async def test_a_picture_alone_says_nothing_of_the_decoder_s_pace(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "models")
    path = folder / "rkvlm.json"
    manifest = json.loads(path.read_text())
    manifest["encoders"][0]["tokens"] = 64
    manifest["embeddings"]["pictures"] = "rows"
    path.write_text(json.dumps(manifest))
    async with open_house(tmp_path) as house:
        before = house.tools.residency.pace("scripted").prefill_rate
        found, end = await made(submit(house, inputs(picture=True)))
        assert len(found) == 1, end
        assert house.tools.residency.pace("scripted").prefill_rate == before
        await made(submit(house, inputs("a longer text than eight tokens")))
        assert house.tools.residency.pace("scripted").prefill_rate != before


async def test_detail_chooses_among_the_encoders(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "models")
    path = folder / "rkvlm.json"
    manifest = json.loads(path.read_text())
    (middle,) = manifest["encoders"]
    small = {**middle, "width": 8, "height": 8, "tokens": 2}
    large = {**middle, "width": 32, "height": 32, "tokens": 9}
    manifest["encoders"] = [middle, small, large]
    path.write_text(json.dumps(manifest))
    async with open_house(tmp_path, scripts=Scripts({}, {"mode": "echo"}, {})) as house:

        async def tokens(request: ChatRequest) -> int:
            with trio.fail_after(30):
                _, end = await collect(submit(house, request))
            assert end.reason == "stop", end
            return end.usage.image_tokens

        for detail, wanted in (("auto", 4), ("low", 2), ("high", 9)):
            request = chat("x", pictures=1)
            sources = tuple(replace(s, detail=detail) for s in request.pictures)  # type: ignore[arg-type]
            assert await tokens(replace(request, pictures=sources)) == wanted
            request = film(videos.gif(3))
            sources = tuple(replace(s, detail=detail) for s in request.videos)
            assert await tokens(replace(request, videos=sources)) == 3 * wanted
