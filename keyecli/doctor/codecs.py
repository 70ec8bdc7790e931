"""Whether the installed PyAV and FFmpeg decode what videos come in: a few frames are encoded in memory and read back."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from keyecli.doctor.finding import Finding
from keyecli.model.shards import one_line

WIDTH, HEIGHT, FRAMES = 128, 96, 6
# A lossy codec may change a plain grey by so much, of 255.
ALLOWED_DIFFERENCE = 8
REINSTALL = "reinstall PyAV with its own FFmpeg: pip install --force-reinstall --only-binary av av"


@dataclass(frozen=True)
class Codec:
    """A video codec: FFmpeg's name for it, and encoders for it with options that make them quick and quiet."""

    title: str
    name: str
    encoders: dict[str, dict[str, str]]


CODECS = (
    Codec("H.264", "h264", {"libx264": {"preset": "ultrafast"}, "libopenh264": {}}),
    Codec("HEVC", "hevc", {"libx265": {"preset": "ultrafast", "x265-params": "log-level=none"}}),
    Codec("VP9", "vp9", {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}),
    Codec("AV1", "av1", {"libsvtav1": {"preset": "10"}, "libaom-av1": {"cpu-used": "8"}}),
)


def check_codecs() -> Iterator[Finding]:
    """The versions, then one finding a codec."""
    libraries = ", ".join(
        f"{name} {'.'.join(map(str, version))}"
        for name, version in av.library_versions.items()
        if name in ("libavcodec", "libavformat", "libswscale")
    )
    text = f"{av.__version__} with {libraries}"
    yield Finding("video", "PyAV", "ok", text, details={"version": av.__version__})
    for codec in CODECS:
        yield check_codec(codec)


def check_codec(codec: Codec) -> Finding:
    """Decode what an encoder made; where there is no encoder, whether there is a decoder."""
    try:
        av.Codec(codec.name, "r")
    except ValueError:
        text = f"no decoder: {codec.title} videos cannot be read"
        return Finding("video", codec.title, "problem", text, REINSTALL, {"decoder": False, "decoded": False})
    encoder = next((name for name in codec.encoders if _exists(name)), None)
    if encoder is None:
        text = "a decoder is there; not tried, since no encoder is"
        return Finding("video", codec.title, "ok", text, details={"decoder": True, "decoded": False})
    try:
        decoded = _decode(_encode(codec, encoder))
    except av.FFmpegError as error:
        text = f"the decoder fails on frames of {encoder}: {one_line(error)}"
        return Finding("video", codec.title, "problem", text, REINSTALL, {"decoder": True, "decoded": False})
    wrong = len(decoded) != FRAMES or not np.allclose(decoded, _levels(), atol=ALLOWED_DIFFERENCE)
    if wrong:
        text = f"frames of {encoder} come back wrong: levels {decoded} instead of {_levels()}"
        return Finding("video", codec.title, "problem", text, REINSTALL, {"decoder": True, "decoded": False})
    text = f"{FRAMES} frames of {encoder} decoded as they were"
    return Finding("video", codec.title, "ok", text, details={"decoder": True, "decoded": True})


def _exists(encoder: str) -> bool:
    try:
        av.Codec(encoder, "w")
    except ValueError:
        return False
    return True


def _levels() -> list[int]:
    """A grey for every frame, far enough apart to tell frames from each other."""
    return [60 + 20 * number for number in range(FRAMES)]


def _encode(codec: Codec, encoder: str) -> bytes:
    buffer = io.BytesIO()
    # SVT-AV1 writes to stderr past FFmpeg's log, unless this is in its environment.
    os.environ.setdefault("SVT_LOG", "0")
    with av.open(buffer, "w", format="matroska") as container:
        stream: Any = container.add_stream(encoder, rate=10, options=codec.encoders[encoder])
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, level in enumerate(_levels()):
            picture = np.full((HEIGHT, WIDTH, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _decode(content: bytes) -> list[int]:
    """The mean grey of every frame."""
    with av.open(io.BytesIO(content), "r") as container:
        return [round(float(frame.to_ndarray(format="rgb24").mean())) for frame in container.decode(video=0)]
