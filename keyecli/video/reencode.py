"""Encodes a part of a clip again, so that it can begin and end anywhere: H.264 picture, AAC sound, an mp4 file."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from heapq import merge
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keyecli.errors import KeyeError
from keyecli.video.decode import decode_frames
from keyecli.video.remux import SEEK_EARLIER_S, TOLERANCE_S, decode_time, demux, first_frame_s, open_track
from keyecli.video.sampling import SamplingPlan
from keyecli.video.source import VideoInfo, open_video

if TYPE_CHECKING:
    from av import AudioFrame, Packet

_ENCODER = "libx264"
# A constant rate factor of 18 is close to what the eye cannot tell from the source. Without B-frames frames are stored in the
# order they are shown: the clip begins at 0 in every player, and the last frame keeps its own duration.
_PICTURE_OPTIONS = {"crf": "18", "preset": "fast", "bf": "0"}
_BT709, _LIMITED_RANGE = 1, 1  # ITU-T H.273 numbers
_CHUNK_FRAMES = 8
_NEAR_S = Fraction(
    1, 10
)  # a frame that begins this soon behind a boundary begins there: times have one decimal

_SOUND_BITS_PER_CHANNEL = 96_000
# fmt: off
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
# fmt: on
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
_SOUND_JUMP_S = 0.02  # smaller steps between sound packets are rounded timestamps, not gaps


@dataclass(frozen=True)
class EncodeJob:
    """One part as it will be encoded: `times_s` are its frames, [start_s, end_s) is what it shows, in the clip's seconds.

    The first frame may begin before `start_s`; then it is shown from `start_s` on.
    """

    info: VideoInfo
    times_s: tuple[Fraction, ...]
    start_s: Fraction
    end_s: Fraction


def plan_encode(info: VideoInfo, start_s: Fraction, end_s: Fraction) -> EncodeJob:
    """Find the frames that are on screen in [start_s, end_s).

    A boundary with a frame that begins at it or up to a tenth of a second behind it moves there, so that frames stay
    whole; elsewhere (slides, screen recordings) it stays and the frame on screen is cut in time. KeyeError without an
    H.264 encoder.
    """
    import av

    if _ENCODER not in av.codecs_available:
        raise KeyeError(
            f"this FFmpeg has no {_ENCODER} to encode with; leave out --exact, or install PyAV from PyPI"
        )
    start_s, end_s = _boundary(info, start_s), _boundary(info, end_s)
    ticks, tick_s = info.frame_times.ticks, info.frame_times.time_base
    first = max(0, bisect_right(ticks, math.floor(start_s / tick_s)) - 1)
    behind = max(first + 1, bisect_left(ticks, math.ceil(end_s / tick_s)))
    if end_s <= start_s:  # a part that lies between two frames near each other: the one on screen
        end_s = info.frame_times[behind] if behind < len(ticks) else info.duration_s
    return EncodeJob(info, info.frame_times[first:behind], start_s, end_s)


def encode_part(job: EncodeJob, path: Path, on_packet: Callable[[Fraction], None]) -> None:
    """Write the part to `path`, an mp4 file; `on_packet` hears the time reached, in seconds from its start.

    Frames keep their presentation times. They are stored upright with square pixels in 8-bit BT.709 (HDR is tone-mapped,
    interlaced frames are completed, an odd width or height becomes even), as the model sees them. All sound is kept,
    trimmed to the sample; subtitles are not. InputError for what cannot be decoded; FFmpeg's and the system's errors
    when writing fails.
    """
    import av

    with ExitStack() as stack:
        output = stack.enter_context(av.open(str(path), "w", format="mp4"))
        tracks: list[Iterator[Packet]] = [_picture(job, _picture_stream(output, job))]
        if job.info.reader == "ffmpeg":
            source, _ = open_video(job.info.path)
            with source:
                # A codec that this FFmpeg does not know has neither channels nor a rate.
                sounds = [s for s in source.streams.audio if s.codec_context and s.channels and s.sample_rate]
                tracks += [_sound(job, s.index, _sound_stream(output, s)) for s in sounds]
        for packets in tracks:
            stack.callback(packets.close)  # type: ignore[attr-defined]
        for packet in merge(*tracks, key=decode_time):
            reached_s = decode_time(packet)
            output.mux(packet)
            on_packet(reached_s)


def _boundary(info: VideoInfo, time_s: Fraction) -> Fraction:
    times = info.frame_times
    following = bisect_left(times.ticks, math.ceil((time_s - TOLERANCE_S) / times.time_base))
    if following < len(times) and times[following] - time_s < _NEAR_S:
        return times[following]
    return min(time_s, info.duration_s)


def _picture_stream(output: Any, job: EncodeJob) -> Any:
    rate = (job.info.average_rate or Fraction(1)).limit_denominator(1001)
    stream = output.add_stream(_ENCODER, rate=max(rate, Fraction(1)), options=_PICTURE_OPTIONS)
    stream.width, stream.height = _even(job.info.width), _even(job.info.height)
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    # The clip's own unit of time, so that no presentation time is rounded.
    context.time_base = Fraction(1, job.info.frame_times.time_base.denominator)
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    return stream


def _even(pixels: int) -> int:
    return max(2, pixels // 2 * 2)


def _picture(job: EncodeJob, stream: Any) -> Iterator[Packet]:
    time_base = stream.codec_context.time_base
    length = max(1, round((job.end_s - job.start_s) / time_base))
    durations: dict[int, int] = {}
    shown, pts = None, 0
    for time_s, picture in _pictures(job, stream.height, stream.width):
        if shown is not None:
            # A damaged frame's neighbour, which comes with its own time, may belong before the start.
            pts = max(pts + 1, round((time_s - job.start_s) / time_base))
            durations[shown.pts] = pts - shown.pts
            yield from _timed(stream.encode(shown), durations)
        shown = _frame(picture, pts, time_base)
    durations[pts] = max(1, length - pts)
    for frame in (shown, None):
        yield from _timed(stream.encode(frame), durations)


def _pictures(job: EncodeJob, height: int, width: int) -> Iterator[tuple[Fraction, np.ndarray]]:
    plan = SamplingPlan(job.times_s, height, width, "video", 0.0)
    for chunk in decode_frames(job.info, plan, chunk_frames=_CHUNK_FRAMES):
        yield from zip(chunk.times_s, chunk.frames, strict=True)


def _frame(picture: np.ndarray, pts: int, time_base: Fraction) -> Any:
    from av import VideoFrame
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
    )
    frame.pts, frame.time_base = pts, time_base
    return frame


def _timed(packets: list[Packet], durations: dict[int, int]) -> Iterator[Packet]:
    """The encoder's packets with how long each frame is shown, which for the last one only we know."""
    for packet in packets:
        assert packet.pts is not None
        packet.duration = durations.pop(packet.pts)
        yield packet


def _sound_stream(output: Any, source: Any) -> Any:
    rate = source.sample_rate if source.sample_rate in _AAC_RATES else 48_000
    stream = output.add_stream("aac", rate=rate)
    layout = _LAYOUTS.get(source.channels, "stereo")
    stream.layout, stream.format = layout, "fltp"
    stream.bit_rate = _SOUND_BITS_PER_CHANNEL * stream.channels
    stream.codec_context.time_base = Fraction(1, rate)
    if language := source.metadata.get("language"):
        stream.metadata["language"] = language
    return stream


def _sound(job: EncodeJob, index: int, stream: Any) -> Iterator[Packet]:
    """One sound track, encoded; silence where the source has none."""
    from av import AudioFrame

    rate, layout = stream.sample_rate, stream.layout.name
    position = 0
    for samples in _trimmed(job, index, rate, layout):
        frame = AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), position
        position += samples.shape[1]
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _trimmed(job: EncodeJob, index: int, rate: int, layout: str) -> Iterator[np.ndarray]:
    """float32 [channels, n] pieces that together are exactly as long as the part.

    Sound runs on from packet to packet as long as its timestamps are within 20 ms of that; a real gap is filled with
    silence, what overlaps is dropped.
    """
    total = round((job.end_s - job.start_s) * rate)
    origin_s = first_frame_s(job.info) + job.start_s
    written = 0  # samples given out
    following: int | None = None  # where the next piece begins if it follows the last one
    channels = 0
    for frame in _resampled(job.info.path, index, origin_s, rate, layout):
        piece = np.asarray(frame.to_ndarray(), np.float32)
        channels = piece.shape[0]
        begin = round((_start_s(frame) - origin_s) * rate)
        if following is not None and abs(begin - following) <= _SOUND_JUMP_S * rate:
            begin = following
        following = begin + piece.shape[1]
        if begin >= total:
            break
        if begin > written:
            yield np.zeros((channels, begin - written), np.float32)
            written = begin
        piece = piece[:, max(0, written - begin) : total - begin]
        if piece.shape[1]:
            yield np.ascontiguousarray(piece)
            written += piece.shape[1]
    if channels and written < total:
        yield np.zeros((channels, total - written), np.float32)


def _resampled(path: Path, index: int, origin_s: Fraction, rate: int, layout: str) -> Iterator[AudioFrame]:
    """Decoded sound from somewhat before `origin_s` (the container's seconds) on; damaged packets are left out."""
    import av

    resampler, form = None, None
    with open_track(path, index, origin_s - SEEK_EARLIER_S) as (container, stream):
        for packet in demux(container, stream):
            try:
                frames = stream.decode(packet)
            except av.error.FFmpegError:
                continue
            for frame in frames:
                if frame.pts is None:
                    continue
                # Broadcasts go from stereo to surround and back in the middle of a track.
                if resampler is None or form != _form(frame):
                    if resampler is not None:
                        yield from resampler.resample(None)
                    resampler, form = av.AudioResampler(format="fltp", layout=layout, rate=rate), _form(frame)
                yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _form(frame: AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _start_s(frame: AudioFrame) -> Fraction:
    assert frame.pts is not None
    assert frame.time_base is not None
    return frame.pts * frame.time_base
