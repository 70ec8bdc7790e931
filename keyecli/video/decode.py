"""Decodes the frames of a plan, in order, in chunks of fixed size, at their own presentation times."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from keyecli.errors import InputError, KeyeWarning
from keyecli.video.deinterlace import deinterlace
from keyecli.video.images import iterate_animation, load_image, resize_bicubic
from keyecli.video.sampling import SamplingPlan
from keyecli.video.scale import FrameScaler
from keyecli.video.source import VideoInfo, decode_packets, open_video, read_packets
from keyecli.video.stretches import Convert, decode_stretches, split_at_entries
from keyecli.video.timecode import format_time

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

# Seeking drops the decoder's pipeline, so it pays only when more frames than this are jumped over.
_SEEK_FRAMES = 48


@dataclass(frozen=True)
class FrameChunk:
    """Decoded frames: `times_s` one a frame, in seconds; `frames` uint8 RGB [N, H, W, 3], C-contiguous, upright."""

    times_s: tuple[Fraction, ...]
    frames: np.ndarray


def decode_frames(
    info: VideoInfo,
    plan: SamplingPlan,
    *,
    exact_resize: bool = False,
    strict: bool = False,
    chunk_frames: int = 16,
) -> Iterator[FrameChunk]:
    """Yield the frames of `plan`, ascending in time, `chunk_frames` at a time, at ``plan.height x plan.width``.

    Memory does not grow with the clip: one chunk, the decoders' own few frames and some pictures that wait
    their turn are held. A chunk is not touched again after it has been yielded. Threads that decode ahead end
    when the iteration does, or is closed.

    A frame is delivered for a planned time only if it decodes cleanly and has exactly that presentation
    time. Where the file's structure allows it, stretches between keyframes are decoded in parallel, without
    the packets that no planned frame needs (decode_stretches); the rest goes in one sequence that seeks to
    the keyframe before a wanted frame when that jumps over many frames, and starts over without seeking or
    frame threads when anything comes out other than planned. The pixels are the same. Where a planned frame
    is damaged, the nearest good frame not used otherwise stands in **with its own time**, and where there
    is none the frame is left out; a file that ends early yields what can be decoded. Either gives one
    KeyeWarning that says where. With `strict` it is an InputError instead. InputError too when no frame at
    all can be decoded.

    Still images are resized by Pillow's bicubic filter, frames as FrameScaler says (`exact_resize` picks
    its exact way).
    """
    if chunk_frames < 1:
        raise ValueError("chunk_frames must be at least 1")
    report_cut_off(info, strict)
    return _chunks(info, plan, exact_resize, strict, chunk_frames)


def report_cut_off(info: VideoInfo, strict: bool = False) -> None:
    """For a file that ends early a KeyeWarning that says up to where it can be read, with `strict` an InputError."""
    if info.truncated_at_s is None:
        return
    readable = format_time(info.truncated_at_s)
    if strict:
        raise InputError(f"{info.path} is cut off after {readable}: leave out --strict to use that part")
    message = f"{info.path.name} is cut off: it can be read only up to {readable}, and the rest is missing"
    warnings.warn(message, KeyeWarning, stacklevel=2)


def _chunks(
    info: VideoInfo,
    plan: SamplingPlan,
    exact_resize: bool,
    strict: bool,
    chunk_frames: int,
) -> Iterator[FrameChunk]:
    times: list[Fraction] = []
    frames = np.empty((0, 0, 0, 3), np.uint8)
    done = 0
    for time_s, picture in _pictures(info, plan, exact_resize, strict):
        if not times:
            frames = np.empty((min(chunk_frames, plan.frames - done), plan.height, plan.width, 3), np.uint8)
        frames[len(times)] = picture
        times.append(time_s)
        done += 1
        if len(times) == len(frames):
            yield FrameChunk(tuple(times), frames)
            times = []
    if times:
        yield FrameChunk(tuple(times), frames[: len(times)])
    if not done:
        raise InputError(f"{info.path} holds no picture that can be decoded; get a complete copy of it")


def _pictures(
    info: VideoInfo, plan: SamplingPlan, exact_resize: bool, strict: bool
) -> Iterator[tuple[Fraction, np.ndarray]]:
    """(time in seconds, RGB picture [plan.height, plan.width, 3]) of each frame."""
    if info.reader == "pillow" and info.kind == "image":
        yield Fraction(0), resize_bicubic(load_image(info.path), plan.height, plan.width)
        return
    if info.kind == "image":
        upright = _turned(info.coded_height, info.coded_width, info.rotation_degrees)
        whole = FrameScaler(*upright, rotation_degrees=info.rotation_degrees, mirrored=info.mirrored)
        for time_s, picture in _SampledVideo(info, plan, lambda: whole, strict).pictures():
            yield time_s, resize_bicubic(np.ascontiguousarray(picture), plan.height, plan.width)
        return

    def scaler() -> FrameScaler:
        return FrameScaler(
            plan.height,
            plan.width,
            rotation_degrees=info.rotation_degrees,
            mirrored=info.mirrored,
            exact=exact_resize,
        )

    if info.reader == "pillow":
        scale = scaler()
        for time_s, frame in _animation_frames(info, plan):
            yield time_s, scale(frame)
    else:
        yield from _SampledVideo(info, plan, scaler, strict).pictures()


def _turned(height: int, width: int, rotation_degrees: int) -> tuple[int, int]:
    return (width, height) if rotation_degrees % 180 else (height, width)


def _animation_frames(info: VideoInfo, plan: SamplingPlan) -> Iterator[tuple[Fraction, VideoFrame]]:
    from av import VideoFrame

    wanted = set(plan.times_s)
    for time_s, picture in zip(info.frame_times, iterate_animation(info.path), strict=False):
        if time_s in wanted:
            yield time_s, VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")


class _SampledVideo:
    """The pictures at the wanted times of one file, in order; what is damaged is gathered and reported once.

    `converter()` makes what turns a frame into a picture; there is one for each thread. A frame's `key` is its
    pts, or its number in decoding order where the file's packets do not tell times (info.matching).
    """

    def __init__(
        self, info: VideoInfo, plan: SamplingPlan, converter: Callable[[], Convert], strict: bool
    ) -> None:
        self._info = info
        self._times_s = times_s = plan.times_s
        self._picture_bytes = plan.height * plan.width * 3
        self._converter, self._convert = converter, converter()
        self._strict = strict
        times = info.frame_times
        indices = [bisect_left(times.ticks, int(time_s / times.time_base)) for time_s in times_s]
        if any(i == len(times) or times[i] != time_s for i, time_s in zip(indices, times_s, strict=True)):
            raise ValueError("the plan names times at which the file has no frame")
        by_number = info.matching == "order"
        self._wanted = indices if by_number else [times.ticks[i] + info.start_pts for i in indices]
        self._position = 0  # index of the next wanted frame
        self._missing: list[Fraction] = []
        self._stand_ins = 0
        self._last_good_s: Fraction | None = None
        self._damage_s: Fraction | None = None  # where the first damaged packet or picture is
        self._damage_key = info.start_pts  # the key of the last one
        self._reached = info.start_pts  # the key of the frame decoded last
        self._healed_s: Fraction | None = None  # the first keyframe behind the last one

    def pictures(self) -> Iterator[tuple[Fraction, np.ndarray]]:
        if stretches := split_at_entries(self._info, self._wanted):
            for pts, picture in decode_stretches(self._info, stretches, self._converter, self._picture_bytes):
                yield self._delivered(pts), picture
        if self._position < len(self._wanted) and self._info.matching == "pts":
            container, stream = open_video(self._info.path)
            with container:
                stream.thread_type = "AUTO"
                yield from self._quickly(container, stream)
        if self._position < len(self._wanted):
            # Frame threads lose whole frames around damage, and a seek may land where references are missing: decode
            # plainly from the start before calling a frame lost.
            container, stream = open_video(self._info.path)
            with container:
                stream.thread_type = "SLICE"
                yield from self._plainly(container, stream)
        self._report_damage()

    def _quickly(
        self, container: InputContainer, stream: VideoStream
    ) -> Iterator[tuple[Fraction, np.ndarray]]:
        """Wanted frames while they come exactly as planned; stops at the first that does not."""
        for keyframe, end in self._runs():
            packets = self._packets(container, stream)
            if keyframe is not None:
                found = self._packets_from(container, stream, keyframe)
                if found is None:
                    return
                packets = found
            for frame in self._decoded(stream, packets):
                wanted = self._wanted[self._position]
                if frame.pts is None or frame.pts < wanted:
                    continue
                if frame.pts > wanted or frame.is_corrupt:
                    return
                yield self._deliver(frame)
                if self._position == end:
                    break
            if self._position < end:
                return

    def _runs(self) -> list[tuple[int | None, int]]:
        """(index of the keyframe to seek to or None, end index of the wanted frames) of stretches decoded without a seek."""
        info, keyframes = self._info, self._info.keyframes
        ticks = info.frame_times.ticks
        runs: list[tuple[int | None, int]] = []
        reached = 0  # index, among all frames, of where decoding stands
        for index in range(self._position, len(self._wanted)):
            pts = self._wanted[index]
            keyframe = keyframes.at_or_before(pts)
            jump = (
                keyframe > 0
                and bisect_left(ticks, keyframes.pts[keyframe] - info.start_pts) - reached > _SEEK_FRAMES
            )
            if jump or not runs:
                runs.append((keyframe if jump else None, index + 1))
            else:
                runs[-1] = (runs[-1][0], index + 1)
            reached = bisect_left(ticks, pts - info.start_pts)
        return runs

    def _packets_from(
        self, container: InputContainer, stream: VideoStream, keyframe: int
    ) -> Iterator[Packet] | None:
        """Packets from the given keyframe on, or None when seeking does not lead there."""
        import av

        pts, position = self._info.keyframes.pts[keyframe], self._info.keyframes.seek[keyframe]
        try:
            container.seek(position, stream=stream, backward=True)
        except av.error.FFmpegError:
            return None
        packets = self._packets(container, stream)
        for packet in packets:
            # What comes before is left out: some decoders show such frames without their references.
            if packet.is_keyframe and packet.pts is not None and packet.pts >= pts:
                return _chain(packet, packets) if packet.pts == pts else None
        return None

    def _plainly(
        self, container: InputContainer, stream: VideoStream
    ) -> Iterator[tuple[Fraction, np.ndarray]]:
        """The remaining wanted frames, or what stands in for them, decoding everything from the start."""
        wanted = self._wanted
        lower = wanted[self._position - 1] if self._position else None
        spare: tuple[int, VideoFrame] | None = None  # the last good frame, while it has not been delivered
        for frame in self._decoded(stream, self._packets(container, stream)):
            if self._position == len(wanted):
                return
            if frame.pts is None or frame.is_corrupt or (lower is not None and frame.pts <= lower):
                continue
            taken = False
            while self._position < len(wanted) and wanted[self._position] < frame.pts:
                gap = wanted[self._position]
                free = not taken and self._is_last_before(frame.pts)
                if spare is not None and (not free or gap - spare[0] <= frame.pts - gap):
                    yield self._stand_in(spare[1])
                    spare = None
                elif free:
                    taken = True
                    yield self._stand_in(frame)
                else:
                    self._leave_out()
            if self._position < len(wanted) and wanted[self._position] == frame.pts:
                taken = True
                yield self._deliver(frame)
            spare = None if taken else (frame.pts, frame)
        if self._position < len(wanted) and spare is not None:
            yield self._stand_in(spare[1])
        while self._position < len(wanted):
            self._leave_out()

    def _is_last_before(self, pts: int) -> bool:
        """Whether no other wanted frame lies between the next wanted one and `pts`, or at `pts`."""
        following = self._position + 1
        return following == len(self._wanted) or self._wanted[following] > pts

    def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
        # The last packet of a cut file is half a picture; elsewhere a doubtful packet may still carry most of one.
        cut = self._info.truncated_at_s is not None
        return (p for p in read_packets(container, stream, lambda: None) if not (cut and p.is_corrupt))

    def _decoded(self, stream: VideoStream, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
        frames = decode_packets(stream, self._watch_packets(packets), self._note_packet)
        if self._info.matching == "order":
            frames = _numbered(frames)
        time_base = stream.time_base or self._info.frame_times.time_base
        return self._watch_frames(deinterlace(frames, time_base))

    def _watch_packets(self, packets: Iterable[Packet]) -> Iterator[Packet]:
        for packet in packets:
            if packet.is_corrupt:
                self._note_packet(packet.pts)
            yield packet

    def _watch_frames(self, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
        for frame in frames:
            if frame.pts is not None:
                self._reached = frame.pts
                if frame.is_corrupt:
                    self._note_damage(frame.pts)
                elif frame.key_frame and self._healed_s is None and frame.pts > self._damage_key:
                    self._healed_s = self._time_s(frame.pts)
            yield frame

    def _note_packet(self, pts: int | None) -> None:
        self._note_damage(self._reached if pts is None or self._info.matching == "order" else pts)

    def _time_s(self, key: int) -> Fraction:
        times = self._info.frame_times
        if self._info.matching == "order":
            return times[min(key, len(times) - 1)]
        return (key - self._info.start_pts) * times.time_base

    def _deliver(self, frame: VideoFrame) -> tuple[Fraction, np.ndarray]:
        assert frame.pts is not None
        return self._delivered(frame.pts), self._convert(frame)

    def _delivered(self, key: int) -> Fraction:
        """Count a wanted frame, or what stands in for it, as done; its own time."""
        self._position += 1
        self._last_good_s = self._time_s(key)
        return self._last_good_s

    def _stand_in(self, frame: VideoFrame) -> tuple[Fraction, np.ndarray]:
        self._note_missing()
        self._stand_ins += 1
        return self._deliver(frame)

    def _leave_out(self) -> None:
        self._note_missing()
        self._position += 1

    def _note_missing(self) -> None:
        missing_s = self._times_s[self._position]
        if self._strict:
            raise InputError(
                f"{self._info.path.name} is damaged: the frame at {format_time(missing_s)} cannot be decoded"
            )
        self._missing.append(missing_s)

    def _note_damage(self, key: int) -> None:
        """Remember where pictures begin to be doubtful; they stay so until the next keyframe."""
        damage_s = max(Fraction(0), self._time_s(key))
        if self._strict:
            raise InputError(
                f"{self._info.path.name} is damaged near {format_time(damage_s)}; get a complete copy of it"
            )
        self._damage_s = damage_s if self._damage_s is None else min(damage_s, self._damage_s)
        self._damage_key = max(key, self._damage_key)
        self._healed_s = None

    def _report_damage(self) -> None:
        if self._last_good_s is None:
            return  # nothing was decoded, which is an error of its own
        total, lost = len(self._wanted), len(self._missing) - self._stand_ins
        parts = []
        if self._missing:
            first, last = format_time(self._missing[0]), format_time(self._missing[-1])
            if self._last_good_s is not None and self._missing[0] > self._last_good_s:
                reached = format_time(self._last_good_s)
                parts.append(
                    f"it can be decoded only up to {reached}, {lost} of the {total} frames wanted are missing"
                )
            else:
                fates = (
                    [f"{self._stand_ins} replaced by the nearest good frame, at its own time"]
                    if self._stand_ins
                    else []
                )
                fates += [f"{lost} left out"] if lost else []
                where = f"at {first}" if first == last else f"between {first} and {last}"
                parts.append(
                    f"{len(self._missing)} of the {total} frames wanted cannot be decoded {where} ({', '.join(fates)})"
                )
        if self._damage_s is not None:
            until = f"up to {format_time(self._healed_s)}" if self._healed_s is not None else "on"
            parts.append(f"the picture may be wrong from {format_time(self._damage_s)} {until}")
        if parts:
            _report(f"{self._info.path.name} is damaged: {'; '.join(parts)}", self._strict)


def _numbered(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    for number, frame in enumerate(frames):
        frame.pts = number
        yield frame


def _chain(first: Packet, rest: Iterator[Packet]) -> Iterator[Packet]:
    yield first
    yield from rest


def _report(message: str, strict: bool) -> None:
    if strict:
        raise InputError(message)
    warnings.warn(message, KeyeWarning, stacklevel=2)
