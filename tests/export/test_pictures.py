"""Pictures: the right frame in the right tile, bars where their times are, and text of any kind."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from keyecli.errors import UsageError
from keyecli.export import pictures
from keyecli.export.pictures import (
    FAINT,
    PAPER,
    ROW_COLOURS,
    Still,
    contact_sheet,
    frames_at,
    save_picture,
    span_plot,
    strip,
    thumbnail_data_uri,
    thumbnail_data_uris,
    tick_step_s,
)
from keyecli.export.timeline import Segment, Timeline
from keyecli.video.source import VideoInfo, probe
from tests.export.conftest import TITLES, make_timeline
from tests.video.conftest import write_clip

# One colour a second: what is on screen says when it is.
SECONDS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200)]


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> VideoInfo:
    """Six seconds at ten frames a second, 400 × 200."""

    def picture(number: int) -> np.ndarray:
        return np.full((200, 400, 3), SECONDS[number // 10], np.uint8)

    path = tmp_path_factory.mktemp("clips") / "colours.mp4"
    return probe(write_clip(path, 60, rate=10, size=(400, 200), picture=picture))


def second_at(image: PIL.Image.Image, x: float, y: float) -> int | None:
    """Which second of the clip the pixel shows; None for no picture."""
    pixel = np.array(image.getpixel((int(x), int(y))), int)
    distances = [int(np.abs(pixel - colour).max()) for colour in SECONDS]
    return distances.index(min(distances)) if min(distances) < 12 else None


def tiles(image: PIL.Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of the pictures, row by row."""
    pixels = np.asarray(image.convert("RGB"), int)
    coloured = (pixels.max(2) - pixels.min(2) > 120) & ~_near(pixels, ROW_COLOURS[0])
    boxes = []
    for top, bottom in _runs(coloured.sum(1) > 50):
        boxes += [(left, top, right, bottom) for left, right in _runs(coloured[top:bottom].mean(0) > 0.9)]
    return boxes


def _near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels - np.array(colour)).max(2) < 3


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(int), [0]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def seconds_in(image: PIL.Image.Image) -> list[int | None]:
    return [
        second_at(image, (left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in tiles(image)
    ]


def test_frames_at_their_times(info: VideoInfo) -> None:
    """Any order, any number of times, between frames and behind the end; one decoding for all."""
    times = [4.95, 0.0, Fraction(1, 3), 2.0, 1.9999, 99.0, 4.95]
    stills = frames_at(info, times, 100)
    assert [float(still.time_s) for still in stills] == [4.9, 0, 0.3, 2, 2, 5.9, 4.9]
    assert [second_at(s.picture, 50, 25) for s in stills] == [4, 0, 0, 2, 2, 5, 4]
    assert {still.picture.size for still in stills} == {(100, 50)}
    assert frames_at(info, [1], 5000)[0].picture.size == (400, 200)  # never enlarged
    assert frames_at(info, [], 100) == []


def test_one_pass_for_all(info: VideoInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = pictures.decode_frames

    def counting(*arguments: object) -> object:
        calls.append(len(arguments[1].times_s))  # type: ignore[attr-defined]
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "decode_frames", counting)
    contact_sheet(info, [Segment(0, 1, "a"), Segment(0, 3, "b"), Segment(2, 4, "c")])
    thumbnail_data_uris(info, [1, 2, 3], 64)
    assert calls == [8, 3]  # each frame once, though two segments begin together


def test_contact_sheet(info: VideoInfo) -> None:
    """A row a segment: its first frame, the one in its middle, and the last that is shown before its end."""
    sheet = contact_sheet(
        info, [Segment(1, 4, "first", score=0.5), Segment(3, 6, "second"), Segment(0.5, 2.2, "third")]
    )
    assert seconds_in(sheet) == [1, 2, 3, 3, 4, 5, 0, 1, 2]
    boxes = tiles(sheet)
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(280, 140)}
    assert len({left for left, *_ in boxes}) == len({top for _, top, *_ in boxes}) == 3
    assert sheet.width == 3 * 280 + 4 * 16
    assert all(right <= sheet.width - 16 and bottom < sheet.height - 16 for _, _, right, bottom in boxes)


def test_contact_sheet_shows_half_a_bar_for_half_a_score(info: VideoInfo) -> None:
    pixels = np.asarray(contact_sheet(info, [Segment(1, 4, "x", score=0.25)]), int)
    [filled] = {
        right - left
        for row in _near(pixels, ROW_COLOURS[0])
        for left, right in _runs(row)
        if right - left > 5
    }
    [empty] = {right - left for row in _near(pixels, FAINT) for left, right in _runs(row) if right - left > 5}
    assert (filled, empty) == (20, 60)


def test_contact_sheet_of_parts_within_a_frame_or_behind_the_end(info: VideoInfo) -> None:
    assert seconds_in(contact_sheet(info, [Segment(1.95, 1.96, "x")])) == [2, 2, 2]
    assert seconds_in(contact_sheet(info, [Segment(4.5, 60, "x")])) == [4, 5, 5]
    assert seconds_in(contact_sheet(info, [Segment(60, 61, "x")])) == [5, 5, 5]


def test_contact_sheet_of_an_upright_clip(tmp_path: Path) -> None:
    clip = write_clip(
        tmp_path / "tall.mp4",
        10,
        size=(96, 160),
        picture=lambda _: np.full((160, 96, 3), SECONDS[1], np.uint8),
    )
    sheet = contact_sheet(probe(clip), [Segment(0, 0.4, "x")])
    boxes = tiles(sheet)
    assert [(right - left, bottom - top) for left, top, right, bottom in boxes] == [(96, 160)] * 3


def bars(plot: PIL.Image.Image, row: int) -> list[tuple[int, int]]:
    """Left and right end of the bars in a row's colour."""
    pixels = np.asarray(plot, int)
    outlined = _near(pixels, ROW_COLOURS[row])
    # The upper edge of a bar has its full colour whatever the score.
    [line] = [y for y in range(plot.height) if outlined[y].any() and not outlined[y - 1].any()][:1]
    return _runs(outlined[line])


def test_bars_stand_where_their_times_are() -> None:
    segments = [Segment(10, 20, "cat"), Segment(0, 5, "dog", score=1.0), Segment(35, 40, "cat", score=0.0)]
    plot = span_plot([make_timeline(segments, frames=1000)])  # 40 s
    [(axis_left, axis_right)] = {
        run for row in np.asarray(plot, int).max(2) < 40 for run in _runs(row) if run[1] - run[0] > 500
    }
    length = axis_right - axis_left - 1
    for row, spans in ((0, [(10, 20), (35, 40)]), (1, [(0, 5)])):
        expected = [(axis_left + length * a / 40, axis_left + length * b / 40) for a, b in spans]
        assert bars(plot, row) == [(round(a), round(b)) for a, b in expected]


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0, None])
def test_a_bar_is_fuller_the_surer(score: float | None) -> None:
    plot = span_plot([make_timeline([Segment(10, 30, "x", score=score)])])
    [(left, _)] = bars(plot, 0)
    rows = [y for y in range(plot.height) if plot.getpixel((left, y)) == ROW_COLOURS[0]]
    inside = plot.getpixel((left + 5, rows[len(rows) // 2]))
    strength = {0.0: 0.25, 0.5: 0.625, 1.0: 1.0, None: 1.0}[score]
    expected = [round(strength * c + (1 - strength) * 255) for c in ROW_COLOURS[0]]
    assert isinstance(inside, tuple)
    np.testing.assert_allclose(inside, expected, atol=1)


def test_a_score_is_written() -> None:
    plain = span_plot([make_timeline([Segment(10, 30, "x")])])
    for segment in (
        Segment(10, 30, "x", score=1.0),
        Segment(10, 10.1, "x", score=0.9),
        Segment(39.9, 40, "x", score=0.9),
    ):
        assert np.asarray(span_plot([make_timeline([segment])])).tobytes() != np.asarray(plain).tobytes()
    # Beside a short bar, and before one at the right end.
    for start, end, side in ((10, 10.1, 1), (39.9, 40, -1)):
        plot = span_plot([make_timeline([Segment(start, end, "x", score=0.9)])])
        [(left, right)] = bars(plot, 0)
        rows = [y for y in range(plot.height) if plot.getpixel((left, y)) == ROW_COLOURS[0]]
        pixels = np.asarray(plot, int)[rows[0] : rows[-1]].max(2) < 100
        behind, before = pixels[:, right + 2 : right + 40].any(), pixels[:, left - 40 : left - 2].any()
        assert (bool(behind), bool(before)) == (side == 1, side == -1)


def test_every_query_has_a_row(info: VideoInfo) -> None:
    """Also one that is nowhere; several clips stand below each other."""
    queries = ["nowhere", "  the\nred ball "]
    one = span_plot([make_timeline([Segment(1, 2, "the red ball"), Segment(1, 2, "other")])], queries)
    two = span_plot([make_timeline([Segment(1, 2, "the red ball")]), make_timeline([])], queries)
    none = span_plot([make_timeline([])])
    assert one.width == two.width == none.width == 1200
    frame = none.height - 34
    assert one.height - frame == 3 * 34  # rows
    assert two.height - 2 * frame + 16 == 4 * 34
    assert bars(one, 1)
    pixels = np.asarray(one, int)
    assert not _near(pixels, ROW_COLOURS[0]).any()


def test_long_names_are_shortened() -> None:
    short = span_plot([make_timeline([Segment(0, 40, "x")])])
    long = span_plot([make_timeline([Segment(0, 40, "many words " * 40)])])
    [(short_left, _)], [(long_left, right)] = bars(short, 0), bars(long, 0)
    assert short_left < long_left == 2 * 16 + 300
    assert right == 1200 - 2 * 16
    # Nothing is written over the bar.
    top = next(y for y in range(long.height) if long.getpixel((right - 1, y)) == ROW_COLOURS[0])
    assert (np.asarray(long)[top : top + 22, long_left:right] == ROW_COLOURS[0]).all()


@pytest.mark.parametrize(
    ("duration_s", "step_s"),
    [
        (0.05, 0.01),
        (1, 0.1),
        (9, 1),
        (42, 5),
        (60, 10),
        (75, 10),
        (600, 60),
        (5400, 600),
        (86_400, 14_400),
        (1e7, 1_036_800),
    ],
)
def test_ticks_are_sensible(duration_s: float, step_s: float) -> None:
    assert float(tick_step_s(duration_s, 800)) == pytest.approx(step_s)
    assert duration_s / tick_step_s(duration_s, 800) <= 10


def test_overlapping_bars_show_the_surest() -> None:
    plot = span_plot([make_timeline([Segment(0, 30, "x", score=1.0), Segment(20, 40, "x", score=0.0)])])
    [(left, right)] = bars(plot, 0)
    rows = [y for y in range(plot.height) if plot.getpixel((left, y)) == ROW_COLOURS[0]]
    middle = rows[len(rows) // 2]
    assert plot.getpixel((left + round((right - left) * 0.7), middle)) == ROW_COLOURS[0]
    assert plot.getpixel((left + round((right - left) * 0.8), middle)) != ROW_COLOURS[0]


def test_strip(info: VideoInfo) -> None:
    times = [0.5, 5.5, 1.5, 3.0, 2.0, 4.0, 0.0]
    weights = [0.4, 0.0, 0.1, 0.2, 0.05, 0.05, 0.2]
    image = strip(info, times, [f"{t} s" for t in times], weights)
    assert seconds_in(image) == [0, 5, 1, 3, 2, 4, 0]
    assert len({top for _, top, *_ in tiles(image)}) == 2  # six in a row
    pixels = np.asarray(image, int)
    for (left, _, right, bottom), weight in zip(tiles(image), weights, strict=True):
        under = _near(pixels, ROW_COLOURS[0])[bottom : bottom + 40, left:right]
        assert int(under.any(0).sum()) == round(200 * weight / 0.4)
        assert not under.any() or under.any(0)[0]
    plain = strip(info, times, [""] * 7)
    assert image.height - plain.height == 2 * 10
    assert not _near(np.asarray(plain, int), ROW_COLOURS[0]).any()


def test_strip_of_nothing_that_weighs(info: VideoInfo) -> None:
    image = strip(info, [1.0], ["x"], [0.0])
    assert not _near(np.asarray(image, int), ROW_COLOURS[0]).any()
    for wrong in ({"captions": []}, {"captions": ["x"], "weights": [0.1, 0.2]}):
        with pytest.raises(ValueError, match="1 frames need as many captions and weights"):
            strip(info, [1.0], **wrong)  # type: ignore[arg-type]


def test_nothing_to_show_is_said(info: VideoInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    plain = pictures._write

    def listening(draw: object, place: object, text: str, *rest: object) -> None:
        written.append(text)
        plain(draw, place, text, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "_write", listening)
    for image in (
        contact_sheet(info, []),
        strip(info, [], []),
        span_plot([]),
        span_plot([Timeline.of(info)]),
    ):
        assert (np.asarray(image, int).max(2) < 100).any()
    assert "colours.mp4 (0:06.000): there is no segment to show" in written
    assert "colours.mp4: there is no frame to show" in written
    assert "There is no clip to plot." in written
    assert "there is no segment to show" in written


@pytest.mark.parametrize("title", TITLES)
def test_any_title(info: VideoInfo, title: str) -> None:
    """Letters that the font lacks, control characters, broken text."""
    segment = Segment(1, 2, title, score=0.5)
    assert contact_sheet(info, [segment]).width == 904
    path = f"/clips/{title or 'x'}.mp4".replace("\x00", "")
    plot = span_plot([make_timeline([segment], path=path)], [title] if title.strip() else [])
    assert bars(plot, 0)
    assert strip(info, [1], [title]).width == 232


def test_thumbnails(info: VideoInfo) -> None:
    """JPEG pictures in data: URIs, as wide as asked for, never enlarged."""
    uri = thumbnail_data_uri(info, 3.5, 120)
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    image = PIL.Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert (image.format, image.size) == ("JPEG", (120, 60))
    assert second_at(image, 60, 30) == 3
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", data)


def test_thumbnails_of_upright_clips_are_as_wide(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "tall.mp4", 3, size=(96, 160))
    data = thumbnail_data_uri(probe(clip), 0, 60).partition(",")[2]
    assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).size == (60, 100)


@pytest.mark.parametrize(
    "make", [lambda i: contact_sheet(i, [Segment(0, 1, "x")]), lambda i: strip(i, [0], ["x"])]
)
def test_images_and_animations(tmp_path: Path, make: Callable[[VideoInfo], PIL.Image.Image]) -> None:
    PIL.Image.new("RGB", (300, 200), SECONDS[2]).save(tmp_path / "still.png")
    frames = [PIL.Image.new("RGB", (300, 200), colour) for colour in SECONDS[2:4]]
    frames[0].save(
        tmp_path / "moving.webp", save_all=True, append_images=frames[1:], duration=1000, lossless=True
    )
    for name in ("still.png", "moving.webp"):
        image = make(probe(tmp_path / name))
        assert set(seconds_in(image)) == {2}


def test_saving(info: VideoInfo, tmp_path: Path) -> None:
    image = strip(info, [1], ["x"])
    for name, kind in (("a.png", "PNG"), ("new/b.JPG", "JPEG"), ("c.webp", "WEBP")):
        save_picture(image, tmp_path / name)
        with PIL.Image.open(tmp_path / name) as saved:
            assert (saved.format, saved.size) == (kind, image.size)
    with pytest.raises(UsageError, match=r"a\.png exists; "):
        save_picture(image, tmp_path / "a.png")
    save_picture(image, tmp_path / "a.png", overwrite=True)
    with pytest.raises(
        UsageError,
        match=r"a\.txt does not end in \.png, \.jpg, \.jpeg, \.webp; give the picture such a name$",
    ):
        save_picture(image, tmp_path / "a.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "c.webp", "new"]


def test_too_many_segments_for_one_picture(info: VideoInfo) -> None:
    with pytest.raises(
        UsageError, match=r"^a picture of 904x\d+ pixels is larger than programs can show; show fewer parts$"
    ):
        contact_sheet(info, [Segment(0, 1, "x")] * 1000)


def test_a_damaged_frame_is_replaced_by_its_neighbour(
    info: VideoInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pictures.decode_frames

    def losing(*arguments: object) -> object:
        return (chunk for chunk in plain(*arguments, chunk_frames=1) if chunk.times_s[0] != 2)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "decode_frames", losing)
    stills: list[Still] = frames_at(info, [1, 2, 5], 64)
    assert [int(still.time_s) for still in stills] == [1, 1, 5]
    assert stills[1].picture.getpixel((0, 0)) != PAPER
