"""Copies a part of a clip packet by packet, without decoding: it begins at a keyframe and ends between two frames."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from heapq import merge
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keyecli.errors import InputError, UsageError
from keyecli.video.source import VideoInfo, open_video

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer, OutputContainer

# FFmpeg's name of what is read → what is written for each suffix; the first is the default. Not avi: it stores no times, so
# that sound and picture of a part would begin together although their packets do not.
_CONTAINERS: dict[str, dict[str, str]] = {
    "mov,mp4,m4a,3gp,3g2,mj2": {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov"},
    "matroska,webm": {".mkv": "matroska", ".webm": "webm"},
    "mpegts": {".ts": "mpegts", ".mts": "mpegts", ".m2ts": "mpegts"},
    "flv": {".flv": "flv"},
}
_REORDER_PACKETS = 32  # more than any codec moves a frame between decoding and showing
TOLERANCE_S = Fraction(1, 1000)  # times are printed with three decimals, and then still name their frame
SEEK_EARLIER_S = 1  # sound is stored somewhat before or behind the picture of the same time
_EMPTY_TEXT_BYTES = 2  # an mp4 file says "no subtitle now" with a text of length 0


@dataclass(frozen=True)
class CopyJob:
    """One part as it can be copied: `start_s` and `end_s` are the real times, in seconds from the clip's first frame.

    `keyframe` is its number in ``info.keyframes``; `decode_ticks` are the decoding times of its packets in file order, in
    ticks of the video stream, the keyframe being shown at 0.
    """

    info: VideoInfo
    format: str
    suffix: str
    keyframe: int
    decode_ticks: Sequence[int] = field(repr=False)
    start_s: Fraction
    end_s: Fraction


def plan_copy(info: VideoInfo, start_s: Fraction, end_s: Fraction) -> CopyJob:
    """Find the packets of the part [start_s, end_s); nothing is written.

    It begins at the last keyframe at or before `start_s` (at the file's first one when there is none) and ends at the first
    place at or behind `end_s` where no frame is decoded before the cut and shown after it. Frames that are stored
    behind the keyframe but shown before it are left out: they need what came before. UsageError for a file that can
    only be cut by encoding it again.
    """
    format_name, suffix = _container_of(info)
    if info.matching != "pts" or not info.keyframes.pts:
        raise UsageError(
            f"{info.path.name} does not store when its frames are shown, so that it can only be cut with --exact"
        )
    tick_s = info.frame_times.time_base
    start_tick = info.start_pts + math.floor((start_s + TOLERANCE_S) / tick_s)
    end_tick = info.start_pts + math.ceil((end_s - TOLERANCE_S) / tick_s)
    keyframe = max(0, info.keyframes.at_or_before(start_tick))
    shown = _closed(_shown_ticks(info, keyframe, end_tick), end_tick)
    if not shown:
        raise InputError(
            f"{info.path.name} cannot be read at {float(start_s):.3f} s; get a complete copy of it"
        )
    first = info.keyframes.pts[keyframe]
    following = bisect_right(info.frame_times.ticks, max(shown) - info.start_pts)
    is_last = following == len(info.frame_times)
    # Decoding times are made anew: they are missing behind a seek in some files, and run on from frames left out here.
    ordered = sorted(shown)
    delay = max(due - tick for due, tick in zip(ordered, shown, strict=True))
    return CopyJob(
        info=info,
        format=format_name,
        suffix=suffix,
        keyframe=keyframe,
        decode_ticks=array("q", (due - delay - first for due in ordered)),
        start_s=(first - info.start_pts) * tick_s,
        end_s=info.duration_s if is_last else info.frame_times[following],
    )


def copy_part(job: CopyJob, path: Path, on_packet: Callable[[Fraction], None]) -> None:
    """Write the part to `path`: its picture, all sound, and subtitles; `on_packet` hears the time reached, in seconds.

    Each stream keeps its codec, language and orientation. Sound begins with the first packet that lies wholly in the
    part, a fraction of a packet late and in step with the picture. A subtitle that is on screen at the start begins at 0.
    Data streams and cover pictures are left out. InputError where the source cannot be read; FFmpeg's and the
    system's errors when writing fails.
    """
    import av

    with ExitStack() as stack:
        source, video = open_video(job.info.path)
        stack.enter_context(source)
        output = stack.enter_context(av.open(str(path), "w", format=job.format))
        output.metadata.update(_plain_metadata(source.metadata))
        sources: list[Iterator[Packet]] = [_video(job, _add(output, video))]
        sources += [_sound(job, s.index, _add(output, s)) for s in source.streams.audio]
        sources += [_subtitles(job, s.index, _add(output, s)) for s in source.streams.subtitles]
        for packets in sources:
            stack.callback(packets.close)  # type: ignore[attr-defined]
        for packet in merge(*sources, key=decode_time):
            reached_s = decode_time(packet)
            output.mux(packet)
            on_packet(reached_s)


def _container_of(info: VideoInfo) -> tuple[str, str]:
    """FFmpeg's name of the container to write, and its suffix."""
    container, _ = open_video(info.path)
    with container:
        choices = _CONTAINERS.get(container.format.name)
    if choices is None:
        raise UsageError(f"{info.path.name} is of a kind that can only be cut with --exact")
    suffix = info.path.suffix.lower()
    if suffix not in choices:
        suffix = next(iter(choices))
    return choices[suffix], suffix


def _shown_ticks(info: VideoInfo, keyframe: int, end_tick: int) -> array[int]:
    """When each packet from the keyframe on is shown, in file order, somewhat beyond `end_tick`."""
    shown = array("q")
    beyond = 0
    for packet in _packets_from(info, keyframe):
        assert packet.pts is not None
        shown.append(packet.pts)
        beyond = 0 if packet.pts < end_tick else beyond + 1
        if beyond > _REORDER_PACKETS:
            break
    return shown


def _closed(shown: array[int], end_tick: int) -> array[int]:
    """The shortest beginning of `shown` behind which nothing is shown that comes before its end, or before `end_tick`."""
    earliest = array("q", shown)  # the first to be shown of what stands here or later
    for place in range(len(earliest) - 2, -1, -1):
        earliest[place] = min(earliest[place], earliest[place + 1])
    latest = None
    for place, tick in enumerate(shown[:-1]):
        latest = tick if latest is None else max(latest, tick)
        if latest < earliest[place + 1] >= end_tick:
            return shown[: place + 1]
    return shown


def _packets_from(info: VideoInfo, keyframe: int) -> Iterator[Packet]:
    """The video's packets in file order from a keyframe on, without those that are shown before it."""
    first = info.keyframes.pts[keyframe]
    for seeking in (True, False):
        container, stream = open_video(info.path)
        with container:
            if seeking and not _seek(container, info.keyframes.seek[keyframe], stream):
                continue
            found = False
            for packet in demux(container, stream):
                if packet.pts is None or (info.truncated_at_s is not None and packet.is_corrupt):
                    continue
                if not found:
                    if not packet.is_keyframe or packet.pts < first:
                        continue
                    if packet.pts > first:
                        break  # the seek led too far
                    found = True
                if packet.pts >= first:
                    yield packet
            if found:
                return


def _video(job: CopyJob, target: Any) -> Iterator[Packet]:
    first = job.info.keyframes.pts[job.keyframe]
    for packet, decode_tick in zip(_packets_from(job.info, job.keyframe), job.decode_ticks, strict=False):
        assert packet.pts is not None
        packet.pts, packet.dts = packet.pts - first, decode_tick
        packet.stream = target
        yield packet


def _sound(job: CopyJob, index: int, target: Any) -> Iterator[Packet]:
    """The packets of one sound track between the real times, moved to the part's own."""
    start_s = job.start_s + first_frame_s(job.info)
    with open_track(job.info.path, index, start_s - SEEK_EARLIER_S) as (container, stream):
        for packet in demux(container, stream):
            if packet.pts is None:
                continue
            time_s = packet.pts * packet.time_base - start_s
            if time_s >= job.end_s - job.start_s:
                return
            if time_s > -TOLERANCE_S:
                packet.pts = packet.dts = round(time_s / packet.time_base)
                packet.stream = target
                yield packet


def _subtitles(job: CopyJob, index: int, target: Any) -> Iterator[Packet]:
    """What one subtitle track shows in the part. Read from the start: a line may have come up long before."""
    import av

    start_s = job.start_s + first_frame_s(job.info)
    length_s = job.end_s - job.start_s
    with open_track(job.info.path, index, Fraction(0)) as (container, stream):
        for packet in demux(container, stream):
            if packet.pts is None or packet.size <= _EMPTY_TEXT_BYTES:
                continue
            tick_s = packet.time_base
            begin_s = packet.pts * tick_s - start_s
            end_s = begin_s + (packet.duration or 0) * tick_s
            if begin_s >= length_s:
                return
            if end_s <= 0:
                continue
            cue = av.Packet(bytes(packet))
            cue.time_base, cue.is_keyframe = tick_s, True
            cue.pts = cue.dts = round(max(begin_s, Fraction(0)) / tick_s)
            cue.duration = round(min(end_s, length_s) / tick_s) - cue.pts
            cue.stream = target
            yield cue


@contextmanager
def open_track(path: Path, index: int, from_s: Fraction) -> Iterator[tuple[InputContainer, Any]]:
    """A file opened for one of its sound or subtitle tracks, at or before a time of the container in seconds."""
    from av.stream import Discard

    container, video = open_video(path)
    with container:
        stream = container.streams[index]
        video.discard, stream.discard = Discard.all, Discard.default
        if from_s > 0 and not _seek(container, math.floor(from_s * 1_000_000), None):
            container.seek(0)
        yield container, stream


def first_frame_s(info: VideoInfo) -> Fraction:
    """The container's own time of the clip's first frame, in seconds."""
    return info.start_pts * info.frame_times.time_base


def demux(container: InputContainer, stream: Any) -> Iterator[Packet]:
    """A stream's packets that hold data; ends where the file cannot be read, as everywhere else."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        if packet.size:
            yield packet


def _seek(container: InputContainer, position: int, stream: Any) -> bool:
    """Whether the container could be moved to the position (ticks of the stream; microseconds without one) or before it."""
    import av

    try:
        container.seek(position, stream=stream, backward=True)
    except av.error.FFmpegError:
        return False
    return True


def _add(output: OutputContainer, stream: Any) -> Any:
    """A stream of the same codec in the output; UsageError when the container does not take it."""
    try:
        # "opaque" asks for no encoder: there is none for some codecs that can be copied.
        added = output.add_stream_from_template(stream, opaque=True)
    except ValueError:
        codec = stream.codec_context.name if stream.codec_context else "unknown"
        raise UsageError(
            f"a {output.format.name} file cannot hold the clip's {stream.type} ({codec}); cut it with --exact"
        ) from None
    added.metadata.update(_plain_metadata(stream.metadata))
    return added


def _plain_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Titles and languages, not what described the whole file (durations, sizes, brands)."""
    return {key: value for key, value in metadata.items() if key.lower() in ("title", "language", "comment")}


def decode_time(packet: Packet) -> Fraction:
    assert packet.dts is not None
    return packet.dts * packet.time_base
