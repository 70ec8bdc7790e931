"""Reads still images and animated WebP/AVIF through Pillow: EXIF orientation, transparency, bicubic resizing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keyecli.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF")
_MJPEG_SUFFIXES = {".mjpeg", ".mjpg", ".mjp"}  # begin like a JPEG, but are a stream of them
_EXIF_ORIENTATION = 0x0112
_DEFAULT_DURATION_MS = 100  # what browsers show for a frame that names no duration

# EXIF orientation → (clockwise degrees, mirrored left to right before turning)
_ORIENTATIONS = {1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True),
                 5: (270, True), 6: (90, False), 7: (90, True), 8: (270, False)}  # fmt: skip


@dataclass(frozen=True)
class ImageHeader:
    """What Pillow says of an image; sizes in pixels as stored, `durations_ms` one a frame (empty: a still image)."""

    format: str
    mode: str
    width: int
    height: int
    rotation_degrees: int
    mirrored: bool
    durations_ms: tuple[int, ...]


def read_header(path: Path) -> ImageHeader | None:
    """The header of an image that Pillow reads here; None for videos, GIF and animated PNG, which FFmpeg reads.

    Raises InputError when the file is such an image but damaged.
    """
    import PIL.Image

    if path.suffix.lower() in _MJPEG_SUFFIXES:
        return None
    with _pillow_errors(path):
        try:
            image = _open(path)
        except PIL.UnidentifiedImageError:
            return None
        with image:
            name = image.format or "image"
            moving = getattr(image, "is_animated", False)
            if moving and name == "PNG":
                return None
            durations: tuple[int, ...] = ()
            if moving and name in ("WEBP", "AVIF"):
                durations = _durations(image)
                rotation, mirrored = 0, False
            elif name == "TIFF":
                rotation, mirrored = 0, False  # Pillow turns these itself, their size included
            else:
                rotation, mirrored = _ORIENTATIONS.get(image.getexif().get(_EXIF_ORIENTATION, 1), (0, False))
            return ImageHeader(
                name.lower(), image.mode, image.width, image.height, rotation, mirrored, durations
            )


def load_image(path: Path) -> np.ndarray:
    """The picture of a still image, upright, over white where it is transparent: uint8 RGB [H, W, 3]. InputError if damaged."""
    import PIL.ImageOps

    with _pillow_errors(path), _open(path, "GIF") as image:
        image.load()
        return np.asarray(_over_white(PIL.ImageOps.exif_transpose(image)))


def iterate_animation(path: Path) -> Iterator[np.ndarray]:
    """The frames of an animated WebP or AVIF, uint8 RGB [H, W, 3], one at a time. InputError where the file is damaged."""
    with _pillow_errors(path):
        image = _open(path)
    with image:
        for index in range(getattr(image, "n_frames", 1)):
            with _pillow_errors(path):
                image.seek(index)
                image.load()
                frame = np.asarray(_over_white(image))
            yield frame


def resize_bicubic(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bicubic (antialiased) resize of a uint8 RGB [H, W, 3] picture, as the family's processor resizes images."""
    import PIL.Image

    resized = PIL.Image.fromarray(picture).resize((width, height), PIL.Image.Resampling.BICUBIC)
    return np.ascontiguousarray(resized)


def _open(path: Path, *more_formats: str) -> Image:
    import PIL.Image

    PIL.Image.init()  # a build may lack a plugin, and naming an absent one is an error
    return PIL.Image.open(
        path, formats=[name for name in (*_FORMATS, *more_formats) if name in PIL.Image.OPEN]
    )


def _durations(image: Image) -> tuple[int, ...]:
    durations = []
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()  # the plugins learn a frame's duration when they decode it
        durations.append(round(image.info.get("duration") or 0) or _DEFAULT_DURATION_MS)
    return tuple(durations)


def _over_white(image: Image) -> Image:
    import PIL.Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow would clip 16-bit greys at 255 instead of scaling them.
        values = np.asarray(image, np.float64)
        top = 65535.0 if image.mode != "F" or values.max(initial=0) > 1 else 1.0
        return PIL.Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _pillow_errors(path: Path) -> Iterator[None]:
    """Turn what Pillow raises on damaged files into InputError, and keep its warnings about large pictures quiet."""
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            yield
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{path} is larger than any real picture ({error}); scale it down first") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(
            f"the image {path} is damaged or cut off ({error}); get a complete copy of it"
        ) from error
