"""Pictures in a request: where they may be, in which form, and what is never read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rkvlmd.messages import (
    PicturePart,
    PictureSource,
    TextPart,
    VideoPart,
    VideoSource,
)
from tests.fakes.chat_bodies import PNG, REMOTE, SETTINGS, URI, message, parse, refused


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
        {"type": "image_url", "image_url": URI},
        {"type": "input_image", "image_url": URI, "detail": "original"},
        {"type": "input_image", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": {"url": f"\n {URI} "}},
        {"type": "image_url", "image_url": {"url": PNG}},
        *(
            {"type": "image_url", "image_url": {"url": f"{head},{PNG}"}}
            for head in (
                "data:;base64", "DATA:IMAGE/PNG;BASE64", "data:text/html;base64", "data:x;base64",
                "data:application/octet-stream;charset=utf-8;base64", "data:image/jpeg; base64",
                "data:image/png;base64;x=y",
            )
        ),
    ],
)  # fmt: skip
def test_pictures_are_found(part: Any) -> None:
    request = message([{"type": "input_text", "text": "a"}, part, {"type": "text", "text": "b"}])
    field = "messages[0].content[1].image_url"
    (found,) = request.pictures
    assert replace(found, detail="auto") == PictureSource("base64", PNG, field)
    assert request.turns[0].parts == (TextPart("a"), PicturePart(0), TextPart("b"))


@pytest.mark.parametrize(
    ("part", "detail"),
    [
        ({"image_url": URI}, "auto"),
        ({"image_url": {"url": URI, "detail": "low"}}, "low"),
        ({"image_url": {"url": URI, "detail": "high"}}, "high"),
        ({"image_url": {"url": URI, "detail": None}, "detail": "auto"}, "auto"),
        ({"image_url": URI, "detail": "original"}, "high"),
        ({"image_url": {"url": URI, "detail": "low"}, "detail": "high"}, "low"),
    ],
)
def test_a_picture_has_the_detail_that_is_asked_for(part: Any, detail: str) -> None:
    (found,) = message([{"type": "image_url", **part}]).pictures
    assert found.detail == detail


@pytest.mark.parametrize("detail", ["medium", "", "LOW"])
def test_a_detail_that_nobody_knows_is_refused(detail: str) -> None:
    part = {"type": "image_url", "image_url": {"url": URI, "detail": detail}}
    said = refused("invalid_request", "messages[0].content[0].detail", message, [part])
    assert "auto, low and high" in said


def test_each_picture_keeps_its_place_and_its_turn() -> None:
    picture = {"type": "image_url", "image_url": URI}
    text = {"type": "text", "text": "x"}
    request = parse(
        {
            "messages": [
                {"role": "user", "content": [picture, text, picture]},
                {"role": "assistant", "content": "y"},
                {"role": "user", "content": "z", "images": [PNG]},
            ]
        }
    )
    assert [t.parts for t in request.turns] == [
        (PicturePart(0), TextPart("x"), PicturePart(1)),
        (TextPart("y"),),
        (PicturePart(2), TextPart("z")),
    ]
    assert [p.field for p in request.pictures] == [
        "messages[0].content[0].image_url",
        "messages[0].content[2].image_url",
        "messages[2].images[0]",
    ]


@pytest.mark.parametrize(
    ("content", "images", "parts"),
    [
        ("hi", "AB", ("A", "B", "hi")),
        ("x<|image|>y", "A", ("x", "A", "y")),
        ("<|image|><|image|>", "AB", ("A", "B")),
        ("1<|image|>2<|image|>3", "AB", ("1", "A", "2", "B", "3")),
        # surplus marks are plain text
        ("1<|image|>2<|image|>3", "A", ("1", "A", "2<|image|>3")),
        ("a<|image|>b", "", ("a<|image|>b",)),
        # surplus pictures come first
        ("1<|image|>2", "ABC", ("B", "C", "1", "A", "2")),
        (None, "A", ("A",)),
        ("", "A", ("A",)),
        ([{"type": "text", "text": "<|image|>"}], "A", ("A", "<|image|>")),
        ([], "A", ("A",)),
    ],
)
def test_the_simple_form(content: Any, images: str, parts: tuple[str, ...]) -> None:
    sources = {letter: letter * 70 for letter in images}
    request = message(content, images=list(sources.values()))
    names = {text: letter for letter, text in sources.items()}
    found = [
        part.text if isinstance(part, TextPart) else names[request.pictures[part.index].data]
        for part in request.turns[0].parts
    ]
    assert tuple(found) == parts


def test_the_simple_form_takes_data_uris_and_any_base64() -> None:
    jpeg = "/9j/" + "A" * 80
    request = message("x", images=[URI, jpeg, "!!garbage!!", "ab\ncd"])
    assert [p.data for p in request.pictures] == [PNG, jpeg, "!!garbage!!", "ab\ncd"]


@pytest.mark.parametrize(
    "source",
    [
        "file:///etc/passwd", "FILE:/etc/passwd", "/etc/passwd", "/etc/" + "x" * 100, "./a.png",
        "../a", "~/a.png", "C:\\a.png", "c:/a", "\\\\host\\share", "ftp://x/a.png", "gopher://x",
        "javascript:alert(1)", "blob:http://x/1", "data:image/png,abc", "data:image/png;base64",
        "data:", "data:;base64" + ";x" * 2000 + ",AAAA", "http+unix://x",
    ],
)  # fmt: skip
def test_sources_that_are_never_read(source: str) -> None:
    for settings in (SETTINGS, REMOTE):
        part = {"type": "image_url", "image_url": {"url": source}}
        param = "messages[0].content[0].image_url"
        refused("invalid_image_url", param, message, [part], settings)
        part = {"type": "input_image", "image_url": source}
        refused("invalid_image_url", param, message, [part], settings)
        param = "messages[0].images[0]"
        text = refused("invalid_image_url", param, message, "x", settings, images=[source])
        assert "passwd" not in text


@pytest.mark.parametrize("source", ["image.png", "a/b", "pictures/of/cats", "x" * 63])
def test_short_names_are_not_base64(source: str) -> None:
    part = {"type": "image_url", "image_url": {"url": source}}
    refused("invalid_image_url", "messages[0].content[0].image_url", message, [part])


def test_remote_pictures() -> None:
    part = {"type": "image_url", "image_url": {"url": "HTTPS://example.org/a.png"}}
    field = "messages[0].content[0].image_url"
    assert "media.remote" in refused("invalid_image_url", field, message, [part])
    assert message([part], REMOTE).pictures == (
        PictureSource("url", "HTTPS://example.org/a.png", field),
    )
    assert message("x", REMOTE, images=["http://a/b"]).pictures[0].kind == "url"
    part = {"type": "image_url", "image_url": "http://" + "x" * 9000}
    refused("invalid_image_url", field, message, [part], REMOTE)


def test_empty_and_too_many_pictures() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64, "}}
    refused("empty_image_file", "messages[0].content[0].image_url", message, [part])
    text = refused("too_many_images", "messages[0].images[16]", message, "x", images=[PNG] * 17)
    assert "media.max_images" in text
    parts = [{"type": "image_url", "image_url": URI}] * 17
    refused("too_many_images", "messages[0].content[16].image_url", message, parts)


# --- videos --------------------------------------------------------------------------

FILM = "AAAAIGZ0eXBpc29t"


def film(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": url, **more}


@pytest.mark.parametrize(
    ("part", "kind", "data", "detail"),
    [
        (film({"url": f"data:video/mp4;base64,{FILM}"}), "base64", FILM, "low"),
        (film(f" data:;base64,{FILM}"), "base64", FILM, "low"),
        (film({"url": f"data:video/mp4;base64,{FILM}", "detail": "high"}), "base64", FILM, "high"),
        (film({"url": f"data:video/mp4;base64,{FILM}"}, detail="auto"), "base64", FILM, "auto"),
        (film({"url": "DATA:Video/JPEG ;base64,aaa,bbb"}), "frames", "aaa,bbb", "low"),
        ({**film({"url": "data:image/gif;base64,aaaa"}), "type": "input_video"},
         "base64", "aaaa", "low"),
    ],
)  # fmt: skip
def test_videos_are_found(part: Any, kind: Any, data: str, detail: Any) -> None:
    request = message([{"type": "text", "text": "a"}, part])
    field = "messages[0].content[1].video_url"
    assert request.videos == (VideoSource(kind, data, field, detail),)
    assert request.pictures == ()
    assert request.turns[0].parts == (TextPart("a"), VideoPart(0))


def test_a_video_is_fetched_only_where_that_is_allowed() -> None:
    url = "https://example.com/a.mp4"
    field = "messages[0].content[0].video_url"
    said = refused("invalid_image_url", field, message, [film({"url": url})])
    assert "media.remote" in said
    assert "videos" in said
    request = message([film({"url": url})], REMOTE)
    assert request.videos == (VideoSource("url", url, field, "low"),)
    refused("invalid_image_url", field, message, [film("https://a.b/" + "a" * 9000)], REMOTE)


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///a.mp4", "a.mp4", "", "ftp://a/b", FILM * 20, "rtsp://a/b"]
)
def test_other_videos_are_never_read(url: str) -> None:
    field = "messages[0].content[0].video_url"
    refused("invalid_image_url", field, message, [film({"url": url})], REMOTE)


@pytest.mark.parametrize("value", [None, 7, {}, {"url": 7}, ["data:;base64,aaaa"]])
def test_a_video_without_a_url(value: Any) -> None:
    refused("invalid_request", "messages[0].content[0].video_url", message, [film(value)])


def test_the_number_of_videos_and_of_their_frames_has_a_bound() -> None:
    part = film({"url": f"data:video/mp4;base64,{FILM}"})
    most = SETTINGS.media.max_videos
    assert len(message([part] * most).videos) == most
    field = f"messages[0].content[{most}].video_url"
    assert "media.max_videos" in refused("invalid_request", field, message, [part] * (most + 1))
    frames = film({"url": "data:video/jpeg;base64," + ",".join(["aaaa"] * 1025)})
    said = refused("invalid_request", "messages[0].content[0].video_url", message, [frames])
    assert "holds 1025 frames; at most 1024" in said
    empty = film({"url": "data:video/mp4;base64,"})
    refused("empty_image_file", "messages[0].content[0].video_url", message, [empty])
