"""Reading sampled frames of a clip, against a plain PyAV loop over all of its frames on the same cores."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from keyecli.errors import InputError
from keyecli.video.decode import decode_frames
from keyecli.video.deinterlace import deinterlace
from keyecli.video.sampling import FrameBudget, SamplingPlan, SamplingSettings, plan_video
from keyecli.video.scale import FrameScaler
from keyecli.video.source import VideoInfo, open_video, probe

Pictures = Iterator[np.ndarray]

SIZE = (1920, 1080)
RATE = 25
FRAMES = 300
_SHOT_FRAMES = 75  # a cut every few seconds, as in edited footage
_PLENTY_OF_TOKENS = 10**9  # so that the rate alone decides how many frames there are

CLIPS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {}),
    "hevc": ("libx265", {"preset": "fast", "x265-params": "log-level=none"}),
    "h264-all-references": ("libx264", {"preset": "veryfast", "bf": "0"}),
}
"""Name: encoder and options of the clips made here. Keyframes and B-frames are the encoder's own choice; in the last clip
every picture is one that others are predicted from."""


@dataclass(frozen=True)
class VideoMeasurement:
    """Sampled frames of one clip; seconds are medians, spreads the difference of the quartiles.

    `source_frames` of `source` pixels are in the clip, `frames` of `size` pixels are taken. The plain loop's
    pictures were found identical before anything was timed; it decodes with frame threads, and `default_s` is
    the same loop with the threads that PyAV uses when nobody asks. `others`: seconds of other readers at hand,
    and how far their pictures are from ours on average, in levels of 255.
    """

    clip: str
    codec: str
    source: tuple[int, int]
    source_frames: int
    frames: int
    size: tuple[int, int]
    cores: int
    seconds: float
    spread_s: float
    plain_s: float
    plain_spread_s: float
    default_s: float
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """How many times as fast as the plain loop."""
        return self.plain_s / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench.video/1."""
        return {"schema": "keye.bench.video/1", **asdict(self), "speedup": self.speedup}

    def line(self) -> str:
        """One row for a reader."""
        shape = (
            f"{self.codec} {self.source[0]}x{self.source[1]}, {self.frames} of {self.source_frames} frames"
        )
        text = (
            f"{self.clip:<28} {shape:<34} {self.seconds * 1e3:9.1f} ms ±{self.spread_s * 1e3:7.1f} ms"
            f"  {self.speedup:5.2f}x the plain loop ({self.plain_s * 1e3:.1f} ms),"
            f" {self.default_s / self.seconds:.2f}x with PyAV's default threads ({self.default_s * 1e3:.1f} ms)"
        )
        for name, figures in self.others.items():
            text += f", {name} {figures['seconds'] * 1e3:.1f} ms"
        return text


def measure(
    files: Sequence[Path] = (),
    *,
    fps: float = 2.0,
    rounds: int = 5,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[VideoMeasurement]:
    """Measure each file, or clips of each kind in CLIPS that are made for it; `on_step` is told what is being done.

    RuntimeError when a picture is not the plain loop's, bit for bit. InputError for files that cannot be
    read, and for damaged ones.
    """
    if files:
        for path in files:
            yield measure_clip(path, fps=fps, rounds=rounds, on_step=on_step)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in available_clips():
            on_step(f"making {name}, {FRAMES} frames")
            path = write_clip(Path(folder) / f"{name}.mp4", name)
            yield measure_clip(path, fps=fps, rounds=rounds, on_step=on_step)


def available_clips() -> list[str]:
    """Those of CLIPS for which this PyAV has the encoder."""
    import av

    return [name for name, (encoder, _) in CLIPS.items() if encoder in av.codecs_available]


def measure_clip(
    path: Path, *, fps: float = 2.0, rounds: int = 5, on_step: Callable[[str], None] = lambda _: None
) -> VideoMeasurement:
    """Compare the pictures of one clip, then time both ways in turns, so that other load falls on both."""
    info = probe(path)
    if info.kind != "video":
        raise InputError(f"{path} is no video; name a clip to measure")
    plan = plan_video(info, SamplingSettings(fps=fps, budget=FrameBudget(total_tokens=_PLENTY_OF_TOKENS)))
    on_step(f"comparing {path.name}")
    if _digests(_ours(info, plan, strict=True)) != _digests(_plain(info, plan)):
        raise RuntimeError(f"{path.name}: the pictures are not those of decoding every frame")
    ways: dict[str, Callable[[], Pictures]] = {
        "ours": lambda: _ours(info, plan),
        "plain": lambda: _plain(info, plan),
        "default": lambda: _plain(info, plan, threads="SLICE"),
    }
    differences: dict[str, float] = {}
    for name, read in _OTHERS.items():
        if _is_usable(name, on_step):
            ways[name] = lambda read=read: read(info, plan)  # type: ignore[misc]
            differences[name] = _mean_difference(ways[name](), _ours(info, plan))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        on_step(f"timing {path.name}, round {number + 1} of {rounds}")
        for name, way in ways.items():
            begin = time.perf_counter()
            for _ in way():
                pass
            taken[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(times) for name, times in taken.items()}
    return VideoMeasurement(
        clip=path.name,
        codec=info.codec,
        source=(info.coded_width, info.coded_height),
        source_frames=len(info.frame_times),
        frames=plan.frames,
        size=(plan.width, plan.height),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        seconds=median["ours"],
        spread_s=_spread(taken["ours"]),
        plain_s=median["plain"],
        plain_spread_s=_spread(taken["plain"]),
        default_s=median["default"],
        others={
            name: {"seconds": median[name], "mean_difference": difference}
            for name, difference in differences.items()
        },
    )


def _is_usable(name: str, on_step: Callable[[str], None]) -> bool:
    """Whether a library is installed and finds what it needs, such as FFmpeg's own libraries."""
    if find_spec(name) is None:
        return False
    try:
        import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        on_step(f"leaving out {name}, which cannot be loaded: {str(error).strip().splitlines()[0]}")
        return False
    return True


def _ours(info: VideoInfo, plan: SamplingPlan, *, strict: bool = False) -> Pictures:
    for chunk in decode_frames(info, plan, strict=strict):
        yield from chunk.frames


def _plain(info: VideoInfo, plan: SamplingPlan, threads: str = "AUTO") -> Pictures:
    """Every frame decoded at full resolution with FFmpeg's own threads, the planned ones scaled as ours are."""
    scaler = FrameScaler(
        plan.height, plan.width, rotation_degrees=info.rotation_degrees, mirrored=info.mirrored
    )
    times, wanted = info.frame_times, set(plan.times_s)
    container, stream = open_video(info.path)
    with container:
        stream.thread_type = threads
        frames = deinterlace(container.decode(stream), stream.time_base or times.time_base)
        for number, frame in enumerate(frames):
            if info.matching == "order":
                time_s = times[number]
            else:
                assert frame.pts is not None
                time_s = (frame.pts - info.start_pts) * times.time_base
            if time_s in wanted:
                yield scaler(frame)


def _torchcodec(info: VideoInfo, plan: SamplingPlan) -> Pictures:
    """TorchCodec on the CPU, its frames resized by PyTorch."""
    import torch
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    decoder = VideoDecoder(str(info.path), num_ffmpeg_threads=0)
    begin_s = decoder.metadata.begin_stream_seconds or 0.0
    for time_s in plan.times_s:
        # A little later than the frame's own time, which a float may fall short of.
        frame = decoder.get_frame_played_at(begin_s + float(time_s) + 1e-4).data[None].float()
        scaled = torch.nn.functional.interpolate(
            frame, (plan.height, plan.width), mode="bilinear", antialias=True
        )
        yield scaled[0].round().byte().permute(1, 2, 0).numpy()


def _decord(info: VideoInfo, plan: SamplingPlan) -> Pictures:
    """Decord on the CPU, which scales while it decodes."""
    import decord  # type: ignore[import-not-found]

    reader = decord.VideoReader(str(info.path), decord.cpu(0), width=plan.width, height=plan.height)
    numbers = {time_s: number for number, time_s in enumerate(info.frame_times)}
    for time_s in plan.times_s:
        yield reader[numbers[time_s]].asnumpy()


_OTHERS: dict[str, Callable[[VideoInfo, SamplingPlan], Pictures]] = {
    "torchcodec": _torchcodec,
    "decord": _decord,
}


def _digests(pictures: Pictures) -> list[bytes]:
    return [blake2b(np.ascontiguousarray(picture).data).digest() for picture in pictures]


def _mean_difference(pictures: Pictures, expected: Pictures) -> float:
    pairs = zip(pictures, expected, strict=True)
    return float(np.mean([np.abs(one.astype(np.int16) - other).mean() for one, other in pairs]))


def _spread(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    quartiles = statistics.quantiles(times, n=4)
    return quartiles[2] - quartiles[0]


def write_clip(
    path: Path, name: str, *, frames: int | None = None, size: tuple[int, int] | None = None
) -> Path:
    """Encode a clip of CLIPS, FRAMES of SIZE: soft textures that drift, a moving block and film grain, cut into shots."""
    import av

    frames, size = frames or FRAMES, size or SIZE
    encoder, options = CLIPS[name]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for planes in _footage(frames, *size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    return path


def _footage(frames: int, width: int, height: int) -> Iterator[np.ndarray]:
    """uint8 YUV 4:2:0 pictures [height * 3 / 2, width], always the same."""
    rng = np.random.default_rng(0)
    grain = rng.normal(scale=3, size=(height + 64, width + 64)).astype(np.int16)
    reach = max(width, height) // 4  # how far a shot drifts
    luma = blue = red = np.empty(0)
    for number in range(frames):
        step = number % _SHOT_FRAMES
        if step == 0:
            luma = _texture(rng, height + reach, width + reach, 40)
            blue, red = (_texture(rng, (height + reach) // 2, (width + reach) // 2, 12) for _ in range(2))
        x, y = 2 * step % reach, step % reach
        rows, columns = rng.integers(0, 64, 2)  # never the same twice
        picture = luma[y : y + height, x : x + width] + grain[rows:, columns:][:height, :width]
        left = 5 * step % (width * 3 // 4)
        picture[height // 4 : height // 2, left : left + width // 6] = 200
        half = (slice(y // 2, y // 2 + height // 2), slice(x // 2, x // 2 + width // 2))
        planes = [plane.clip(16, 235).astype(np.uint8).ravel() for plane in (picture, blue[half], red[half])]
        yield np.concatenate(planes).reshape(height * 3 // 2, width)


def _texture(rng: np.random.Generator, rows: int, columns: int, contrast: float) -> np.ndarray:
    """int16 [rows, columns] around 128, with the falling spectrum of natural pictures."""
    frequencies = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
    spectrum = np.fft.rfft2(rng.normal(size=(rows, columns))) / np.maximum(frequencies, 1 / columns) ** 1.4
    plane = np.fft.irfft2(spectrum, (rows, columns))
    return (128 + contrast * plane / plane.std()).astype(np.int16)
