"""Still images and animations through Pillow and FFmpeg."""

from __future__ import annotations

import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from keyecli.errors import InputError
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import SamplingSettings, plan_image, plan_video
from keyecli.video.source import probe
from tests.video.conftest import CORNERS, corner_picture, numbered_picture, read_corners, read_number


def decoded(path: Path) -> np.ndarray:
    info = probe(path)
    plan = plan_image(info, SamplingSettings())
    (chunk,) = decode_frames(info, plan)
    assert chunk.times_s == (0,)
    assert chunk.frames.shape == (1, plan.height, plan.width, 3)
    return chunk.frames[0]


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.avif", "a.gif", "a.tga", "a.ppm", "a.jp2"]
)
def test_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    PIL.Image.fromarray(corner_picture()).save(path)
    info = probe(path)
    assert (info.kind, info.width, info.height, list(info.frame_times), info.duration_s) == (
        "image",
        160,
        96,
        [0],
        0,
    )
    assert read_corners(decoded(path)) == [[tuple(cell) for cell in row] for row in CORNERS.tolist()]


def test_resized_by_pillows_bicubic(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    PIL.Image.fromarray(picture).save(tmp_path / "noise.png")
    result = decoded(tmp_path / "noise.png")
    assert result.shape == (84, 140, 3)
    expected = PIL.Image.fromarray(picture).resize((140, 84), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The eight orientations, by what EXIF says of them: where row 0 and column 0 of the stored picture are shown."""
    stored_from_shown = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: np.rot90(p, -1),
    }
    shown = corner_picture()
    image = PIL.Image.fromarray(np.ascontiguousarray(stored_from_shown[orientation](shown)))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    image.save(path, exif=exif)
    info = probe(path)
    assert (info.width, info.height) == (160, 96)
    if suffix != ".tiff":  # Pillow turns TIFF itself
        assert (info.coded_width, info.coded_height) == image.size
    assert read_corners(decoded(path)) == [[tuple(cell) for cell in row] for row in CORNERS.tolist()]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "LA", "RGBA"])
def test_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I;16") else "a.png")
    if mode == "I;16":
        PIL.Image.fromarray(np.full((56, 56), 204 * 257, np.uint16)).save(path)
    else:
        PIL.Image.new("L", (56, 56), 204).convert("RGB").convert(mode, dither=PIL.Image.Dither.NONE).save(
            path
        )
    expected = 255 if mode == "1" else 204
    assert np.abs(decoded(path).astype(int) - expected).max() <= 2


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    PIL.Image.new("RGBA", (56, 56), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decoded(tmp_path / "clear.png") == 255).all()
    image = PIL.Image.new("P", (56, 56), 0)
    image.putpalette([255, 0, 0])
    image.save(tmp_path / "palette.png", transparency=0)
    assert (decoded(tmp_path / "palette.png") == 255).all()


def test_a_wrong_name_does_not_matter(tmp_path: Path) -> None:
    PIL.Image.fromarray(corner_picture()).save(tmp_path / "a.png")
    path = (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    assert probe(path).kind == "image"


@pytest.mark.parametrize("name", ["a.webp", "a.avif", "a.png", "a.gif"])
def test_animations_keep_their_own_times(tmp_path: Path, name: str) -> None:
    durations = [100, 100, 300, 50, 500, 200]
    images = [PIL.Image.fromarray(numbered_picture(number)) for number in range(6)]
    path = tmp_path / name
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    info = probe(path)
    assert info.kind == "animation"
    assert list(info.frame_times) == [Fraction(t, 1000) for t in (0, 100, 200, 500, 550, 1050)]
    assert info.duration_s == Fraction(1250, 1000)
    plan = plan_video(info, SamplingSettings(fps=4))
    numbers = [read_number(frame) for chunk in decode_frames(info, plan) for frame in chunk.frames]
    assert [info.frame_times[number] for number in numbers] == list(plan.times_s)
    assert numbers == [0, 2, 4, 5]  # targets 0, 0.2625, 0.525, 0.7875, 1.05; two of them are nearest to 0.55


def test_damaged_images(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        path = tmp_path / name
        PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(
            path
        )
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(InputError, match=r"damaged or cut off") as caught:
            decoded(path)
        assert name in str(caught.value)


def test_large_images_are_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    PIL.Image.new("RGB", (300, 200)).save(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(InputError, match="larger than any real picture"):
        probe(path)
