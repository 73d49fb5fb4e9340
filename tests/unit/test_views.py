"""Which views a picture becomes, what stands at its place, and that every rule keeps its bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.models import families, geometry, prompt, views
from rkvlmd.models.manifest import Decoder, Encoder, File, Manifest, Patches, Resize, Tags

SIDES = st.integers(1, 9000)
NOTHING = File(file="nothing", sha256="0" * 64)


def encoder(side: int = 448, tokens: int = 64, **more: Any) -> Encoder:
    values = {"width": side, "height": side, **more}
    return Encoder(
        engine="onnx", file="v.onnx", sha256="0" * 64, tokens=tokens, embedding=8, **values
    )


def model(*encoders: Encoder, family: str = "internvl", tags: Tags | None = None) -> Manifest:
    return Manifest(
        schema=1, name="m", family=family, encoders=encoders,
        decoder=Decoder(engine="onnx", files={"embed": NOTHING, "decoder": NOTHING}, context=4096,
                        embedding=8),
        image=tags or Tags(start="<s>", content="<i>", end="</s>"),
    )  # fmt: skip


TILES = Resize(rule="tiles", max_tiles=12, thumbnail=True)
SPLIT = Resize(rule="split", longest=2048)
SLICES = Resize(rule="slices", multiple=14, max_tiles=9)
FIXED = Resize(rule="slices", max_tiles=9)
ASPECT = Resize(rule="aspect", multiple=28, min_pixels=3136, max_pixels=1003520)
CROP = Resize(rule="crop", short=480)
RULES = {
    "stretch": model(encoder()),
    "pad": model(encoder(resize=Resize(rule="pad"))),
    "crop": model(encoder(resize=CROP)),
    "aspect": model(encoder(980, 1280, resize=ASPECT, patches=Patches(size=14, merge=2))),
    "tiles": model(encoder(resize=TILES)),
    "split": model(encoder(512, resize=SPLIT), family="smolvlm"),
    "slices": model(encoder(resize=SLICES), family="minicpmv"),
    "slices of one size": model(encoder(resize=FIXED), family="minicpmv"),
    "base_tiles": model(
        encoder(1024, 273, resize=Resize(rule="base_tiles", min_tiles=2, max_tiles=9)),
        encoder(640, 100, tile=True),
        family="deepseek_ocr",
    ),
}
#: Most views of one picture by each rule.
MOST = {"tiles": 13, "split": 17, "slices": 10, "slices of one size": 10, "base_tiles": 10}


@given(st.sampled_from(sorted(RULES)), SIDES, SIDES, st.sampled_from(["auto", "low", "high"]))
def test_every_rule_keeps_its_bounds(rule: str, width: int, height: int, detail: Any) -> None:
    manifest = RULES[rule]
    plan = views.plan(manifest, width, height, detail)
    assert 1 <= len(plan.views) <= (1 if detail == "low" else MOST.get(rule, 1))
    # Each view has its place in the prompt once, in the order of the views.
    places = [item for item in plan.layout if isinstance(item, int)]
    assert sorted(places) == list(range(len(plan.views)))
    assert plan.tokens == sum(view.tokens for view in plan.views)
    # Admission counts no more than there will be; of one size and one view it counts exactly.
    assert 1 <= views.least(manifest, detail) <= plan.tokens
    if rule in {"stretch", "pad", "crop"}:
        assert views.least(manifest, detail) == plan.tokens
    for view in plan.views:
        entry, (sizes, place, _, _) = manifest.encoders[view.encoder], view.cut
        assert 1 <= view.tokens <= entry.tokens
        assert all(w >= 1 and h >= 1 for w, h in sizes)
        if entry.resize.multiple:
            assert place.width % entry.resize.multiple == 0
            assert place.height % entry.resize.multiple == 0
        else:
            assert (place.width, place.height) == (entry.width, entry.height)
        if rule not in {"pad", "base_tiles", "slices of one size"}:
            # Nothing but these pads.
            assert 0 <= place.left <= sizes[-1][0] - place.width
            assert 0 <= place.top <= sizes[-1][1] - place.height


@given(st.sampled_from(["tiles", "split", "slices", "base_tiles"]), SIDES, SIDES)
def test_the_grid_covers_the_picture_once(rule: str, width: int, height: int) -> None:
    manifest = RULES[rule]
    tile = manifest.encoders[1] if len(manifest.encoders) > 1 else None
    cuts = geometry.cut(width, height, manifest.encoders[0], tile)
    assert len(cuts.cuts) == cuts.rows * cuts.columns + (cuts.whole is not None)
    if not cuts.rows:
        return
    cells = [cut for i, cut in enumerate(cuts.cuts) if i != cuts.whole]
    (size,) = {cut.sizes[-1] for cut in cells}
    places = [cut.place for cut in cells]
    assert places == [
        (x * size[0] // cuts.columns, y * size[1] // cuts.rows,
         size[0] // cuts.columns, size[1] // cuts.rows)
        for y in range(cuts.rows) for x in range(cuts.columns)
    ]  # fmt: skip


@given(SIDES, SIDES, st.sampled_from([28, 32]), st.integers(1, 60), st.integers(1, 400))
def test_snapped_sizes_stay_within_the_budget(
    width: int, height: int, multiple: int, least: int, more: int
) -> None:
    low, high = least * multiple**2, (least + more) * multiple**2 * 4
    w, h = geometry.snapped(width, height, multiple, low, high)
    assert w % multiple == h % multiple == 0
    assert w >= multiple
    assert h >= multiple
    assert w * h <= high
    if max(width, height) <= 50 * min(width, height):
        assert w * h >= low / 2


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([28, 32]))
def test_snapped_is_smart_resize(width: int, height: int, multiple: int) -> None:
    """The formula as published with Qwen2-VL, for what it accepts (ratios of up to 200)."""
    if max(width, height) > 200 * min(width, height):
        return
    least, most = 3136, 1003520
    h, w = round(height / multiple) * multiple, round(width / multiple) * multiple
    if h * w > most:
        beta = (height * width / most) ** 0.5
        h = max(multiple, int(height / beta / multiple) * multiple)
        w = max(multiple, int(width / beta / multiple) * multiple)
    elif h * w < least:
        beta = (least / (height * width)) ** 0.5
        h = -(-height * beta // multiple) * multiple
        w = -(-width * beta // multiple) * multiple
    assert geometry.snapped(width, height, multiple, least, most) == (w, h)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((448, 448), (1, 1)), ((896, 448), (2, 1)), ((448, 1344), (1, 3)), ((640, 480), (4, 3)),
     ((1920, 1080), (4, 2)), ((100, 100), (1, 1)), ((1500, 1500), (3, 3)), ((3000, 100), (12, 1))],
)  # fmt: skip
def test_tiles_of_internvl(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """As counted by hand with InternVL's rule, 1 to 12 tiles of 448 pixels."""
    cuts = geometry.cut(*size, encoder(resize=TILES))
    assert (cuts.columns or 1, cuts.rows or 1) == grid
    assert (cuts.whole == len(cuts.cuts) - 1) or grid == (1, 1)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((448, 448), (1, 1)), ((896, 448), (2, 1)), ((448, 896), (1, 2)), ((896, 896), (2, 2)),
     ((4000, 3000), (3, 3)), ((1280, 720), (3, 2)), ((200, 150), (1, 1))],
)  # fmt: skip
def test_slices_of_minicpmv(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """As counted by hand with the rule of MiniCPM-V 2.6, at most 9 slices of 448 pixels."""
    cuts = geometry.cut(*size, encoder(resize=SLICES))
    assert (cuts.columns or 1, cuts.rows or 1) == grid
    assert cuts.whole == 0


# --- what stands at a picture's place ----------------------------------------------------


def text_of(layout: Any) -> str:
    return "".join(f"[{item}]" if isinstance(item, int) else item for item in layout)


def test_layouts() -> None:
    fake = "<fake_token_around_image>"
    smol = model(
        encoder(512, resize=Resize(rule="split", longest=1024)),
        family="smolvlm", tags=Tags(start=f"{fake}<global-img>", content="<image>", end=fake),
    )  # fmt: skip
    assert text_of(views.plan(smol, 1024, 512).layout) == (
        f"{fake}<row_1_col_1>[0]{fake}<row_1_col_2>[1]\n\n{fake}<global-img>[2]{fake}"
    )
    assert text_of(views.plan(smol, 1024, 512, "low").layout) == f"{fake}<global-img>[0]{fake}"
    intern = model(encoder(resize=TILES), tags=Tags(content="<IMG_CONTEXT>"))
    assert text_of(views.plan(intern, 896, 448).layout) == "<img>[0][1][2]</img>"
    number = f"<image_id>{prompt.NUMBER}</image_id>"
    mini = model(encoder(resize=FIXED), family="minicpmv", tags=Tags(content="<unk>"))
    assert text_of(views.plan(mini, 896, 896).layout) == (
        f"{number}<image>[0]</image><slice>[1]</slice><slice>[2]</slice>\n"
        "<slice>[3]</slice><slice>[4]</slice>"
    )
    assert text_of(views.plan(mini, 64, 64).layout) == f"{number}<image>[0]</image>"
    deep = RULES["base_tiles"]
    assert text_of(views.plan(deep, 1280, 640).layout) == "<s>[0][1][2]</s>"
    assert [view.encoder for view in views.plan(deep, 1280, 640).views] == [1, 1, 0]
    assert text_of(views.plan(deep, 640, 640).layout) == "<s>[0]</s>"


def test_a_rule_may_cut_for_high_detail_alone() -> None:
    """On an NPU that takes seconds for each part, an owner wants that to be asked for."""
    rule = Resize(rule="slices", max_tiles=9, cut_at="high")
    mini = model(encoder(resize=rule), family="minicpmv", tags=Tags(content="<unk>"))
    found = {d: len(views.plan(mini, 896, 896, d).views) for d in ("low", "auto", "high")}
    assert found == {"low": 1, "auto": 1, "high": 5}
    # What shows the whole picture is the same input in each case, and so are its rows.
    assert (
        views.plan(mini, 900, 400, "auto").views[0] == views.plan(mini, 900, 400, "high").views[0]
    )


def test_slices_of_one_size_pad_the_whole_and_stretch_the_parts() -> None:
    cuts = geometry.cut(900, 400, encoder(resize=FIXED))
    assert (cuts.columns, cuts.rows, cuts.whole) == (2, 1, 0)
    whole, *parts = cuts.cuts
    assert (whole.sizes, whole.place) == (((448, 199),), (0, -124, 448, 448))
    assert [cut.place for cut in parts] == [(0, 0, 448, 448), (448, 0, 448, 448)]
    assert {cut.sizes for cut in parts} == {((896, 448),)}


def test_detail_chooses_among_the_encoders() -> None:
    middle, small, large = encoder(448, 64), encoder(224, 16), encoder(896, 256)
    manifest = model(middle, small, large, encoder(100, 4, tile=True))
    chosen = {d: views.plan(manifest, 800, 600, d).views[0] for d in ("auto", "low", "high")}
    assert {d: (view.encoder, view.tokens) for d, view in chosen.items()} == {
        "auto": (0, 64), "low": (1, 16), "high": (2, 256),
    }  # fmt: skip


def test_tokens_of_patches() -> None:
    (view,) = views.plan(RULES["aspect"], 640, 480).views
    assert view.cut.place == (0, 0, 644, 476)
    assert (view.patches, view.grid, view.tokens) == ((1, 34, 46), (1, 17, 23), 17 * 23)


@pytest.mark.parametrize("name", sorted(families.known()))
def test_no_family_loses_a_view(name: str) -> None:
    layout = families.get(name).layout
    tags = Tags(start="<s>", content="<c>", end="</s>")
    cut = geometry.Cut(((1, 1),), geometry.Place(0, 0, 1, 1))
    for columns, rows, whole in ((0, 0, 0), (1, 2, 2), (3, 2, 6), (3, 2, 0), (2, 2, None)):
        # Whatever the rule, in whatever order.
        count = columns * rows + (whole is not None)
        cuts = geometry.Cuts((cut,) * count, rows, columns, whole)
        places = [item for item in layout(tags, cuts) if isinstance(item, int)]
        assert sorted(places) == list(range(count))
