"""Opens a video or image file and finds out its size, orientation, colour and the presentation time of every frame."""

from __future__ import annotations

import stat
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from keyecli.errors import InputError
from keyecli.video.color import Transfer, transfer_of
from keyecli.video.images import ImageHeader, read_header
from keyecli.video.integrity import check_integrity
from keyecli.video.references import EntryPoints

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

# How many decoded frames must carry the very times of their packets before the packets are believed.
_HEAD_FRAMES = 8
_HEAD_FRAMES_INTERLACED = 24  # a field pair may be two packets but one frame, and not from the first frame on
_REORDER_FRAMES = 32  # more than any codec delays a frame
_TEXT_ART = {"tty", "bin", "xbin", "adf", "idf"}  # FFmpeg renders plain text files as pictures
_ANIMATIONS = {"gif", "apng"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


class FrameTimes(Sequence[Fraction]):
    """Presentation times in seconds, strictly ascending, kept as integers: 8 bytes a frame.

    `ticks` are counted from the first frame, in units of `time_base` seconds.
    """

    __slots__ = ("ticks", "time_base")

    def __init__(self, ticks: Iterable[int], time_base: Fraction) -> None:
        self.ticks = array("q", ticks)
        self.time_base = time_base

    def __len__(self) -> int:
        return len(self.ticks)

    @overload
    def __getitem__(self, index: int) -> Fraction: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Fraction, ...]: ...
    def __getitem__(self, index: int | slice) -> Fraction | tuple[Fraction, ...]:
        if isinstance(index, slice):
            return tuple(tick * self.time_base for tick in self.ticks[index])
        return self.ticks[index] * self.time_base

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrameTimes):
            return (self.ticks, self.time_base) == (other.ticks, other.time_base)
        return isinstance(other, (tuple, list)) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"FrameTimes({len(self)} frames, {float(self[0]):.3f} to {float(self[-1]):.3f} s)"


@dataclass(frozen=True)
class Keyframes:
    """Frames that decoding can begin at: their pts, ascending, and the position to seek to, both in the stream's ticks.

    `entries` are the pts of those where the stream itself says that pictures come out exactly as in decoding
    from the start (EntryPoints); at others the container only claims it.
    """

    pts: array[int] = field(default_factory=lambda: array("q"))
    seek: array[int] = field(default_factory=lambda: array("q"))
    entries: array[int] = field(default_factory=lambda: array("q"))

    def at_or_before(self, pts: int) -> int:
        """Index of the last keyframe at or before `pts`; -1 when there is none."""
        return bisect_right(self.pts, pts) - 1


@dataclass(frozen=True)
class VideoInfo:
    """What keye knows of an input before decoding it.

    `width` and `height` are the display size: pixel aspect corrected, then turned. A picture is shown by
    mirroring it left to right when `mirrored`, then turning it `rotation_degrees` clockwise. `frame_times`
    holds the presentation time of every frame that can be read, in seconds; the first is 0 because the
    stream's own start is subtracted. `duration_s` is the last time plus that frame's duration (0 for an
    image); `average_rate` is ``(frames - 1) / (last time - first time)``, 0 for a single frame.
    `truncated_at_s` is set when the file ends early: up to where it can be read.

    The rest tells the decoder how to find a frame again: `matching` "pts" by presentation timestamp
    (`start_pts` is the first frame's), "order" by counting decoded frames, for files whose packets do not
    tell.
    """

    path: Path
    kind: Literal["video", "animation", "image"]
    width: int
    height: int
    coded_width: int
    coded_height: int
    rotation_degrees: int
    pixel_aspect: Fraction
    codec: str
    pixel_format: str
    interlaced: bool
    transfer: Transfer
    frame_times: FrameTimes
    duration_s: Fraction
    average_rate: Fraction
    truncated_at_s: Fraction | None = None
    mirrored: bool = False
    reader: Literal["ffmpeg", "pillow"] = "ffmpeg"
    matching: Literal["pts", "order"] = "pts"
    start_pts: int = 0
    keyframes: Keyframes = field(default_factory=Keyframes, repr=False)


def probe(path: str | Path) -> VideoInfo:
    """Read everything about a file that planning needs; packets are demuxed, only the first few frames are decoded.

    How times are found. Every packet of the video stream gives its presentation time; packets that an edit
    list discards and those that carry no picture are left out, and so are frames before the first one that
    decodes. The first 8 frames (24 of interlaced material) are decoded and compared: when their times are
    not exactly the packets' times (two fields as two packets, H.264 in AVI), or a packet has no
    presentation time (raw streams), or timestamps jump back (joined transport streams), the whole stream is
    decoded once and the decoder's times are used. Where those are missing too, frames are counted at the
    stream's rate.

    InputError: missing, a directory, empty, not a video, audio only, cut off before its index, nothing that
    decodes.
    """
    path = Path(path)
    _check_file(path)
    header = read_header(path)
    if header is not None:
        return _info_of_image(path, header)
    container, stream = open_video(path)
    with container:
        scan = _scan_packets(container, stream)
        scan.unreadable |= check_integrity(path) == "cut"
        if scan.first is None:
            raise InputError(
                f"{path} holds no picture that can be decoded; it is damaged or cut off too early"
            )
        times = scan.frame_times(stream)
        if times is None:
            scan.matching = "order"
            times, scan.last_duration = _times_by_decoding(path)
        # The stream's own fields can be read only while the container is open.
        return _info_of_video(path, container.format.name, stream, scan, times)


def open_video(path: Path) -> tuple[InputContainer, VideoStream]:
    """Open a file and choose its video stream: the largest that is no cover picture. The caller closes the container.

    Only this local file is read: network protocols and file name patterns are off. InputError as in
    probe().
    """
    import av
    from av.stream import Discard, Disposition

    try:
        container = av.open(
            f"file:{path}",
            "r",
            options={"protocol_whitelist": "file", "pattern_type": "none"},
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, UnicodeError) as error:
        raise _open_error(path) from error
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & covers]
    usable = [s for s in streams if s.codec_context is not None and s.width and s.height]
    if not usable or container.format.name in _TEXT_ART:
        sound, art = bool(container.streams.audio), container.format.name in _TEXT_ART
        container.close()
        if art or not (streams or sound):
            raise _not_a_video(path)
        if streams:
            raise InputError(
                f"{path} holds video of a kind that this FFmpeg cannot decode; convert it to H.264 first"
            )
        raise InputError(f"{path} has sound but no pictures; name a video file")
    stream = max(usable, key=lambda s: s.width * s.height)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all  # its packets need not even be read
    return container, stream


def read_packets(
    container: InputContainer, stream: VideoStream, on_error: Callable[[], None]
) -> Iterator[Packet]:
    """The packets of the stream that hold data, in file order; ends, after `on_error()`, where the file cannot be read."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            on_error()
            return
        if packet is None:
            return
        if packet.size and not _is_hidden(stream, packet):
            yield packet


def decode_packets(
    stream: VideoStream, packets: Iterable[Packet], on_error: Callable[[int | None], None]
) -> Iterator[VideoFrame]:
    """Decoded frames in presentation order, the decoder's delay flushed at the end; `on_error(pts)` for each refused packet."""
    import av

    for packet in packets:
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            on_error(packet.pts)
            continue
        yield from frames
    try:
        frames = stream.decode(None)
    except av.error.FFmpegError:
        on_error(None)
        return
    yield from frames


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            with path.open("rb"):
                pass
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a directory, not a video; name one file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file; save the video to a file first")
    if status.st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); get a complete copy of it")
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and read_header(path) is None:
        raise InputError(f"{path} is a HEIC image, which keye cannot read; convert it to JPEG or PNG")


def _open_error(path: Path) -> InputError:
    if check_integrity(path) == "cut before index":
        return InputError(
            f"{path} was cut off before its index (moov) was written; get a complete copy of it"
        )
    return _not_a_video(path)


def _not_a_video(path: Path) -> InputError:
    return InputError(f"{path} is not a video or image that FFmpeg can read; check that it is the right file")


def _is_hidden(stream: VideoStream, packet: Packet) -> bool:
    """VP8 stores reference-only pictures as packets of their own: their show_frame bit is 0."""
    return stream.codec_context.name in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10


class _PacketScan:
    """What one pass over the packets found out."""

    def __init__(self, entry_points: EntryPoints) -> None:
        self._entry_points = entry_points
        self.pts: list[int] = []
        self.keyframes = Keyframes()
        self.first: VideoFrame | None = None
        self.start_pts = 0
        self.matching: Literal["pts", "order"] = "pts"
        self.last_duration = 0
        self.unreadable = False
        self.trustworthy = True
        self._head: list[int | None] = []
        self._last_dts: int | None = None
        self._last_pts: int | None = None

    def add_packet(self, packet: Packet) -> None:
        if packet.dts is not None:
            if self._last_dts is not None and packet.dts < self._last_dts:
                self.trustworthy = False
            self._last_dts = packet.dts
        if packet.pts is None:
            self.trustworthy = False
            return
        if packet.is_corrupt:
            return
        if packet.is_keyframe and (not self.keyframes.pts or packet.pts > self.keyframes.pts[-1]):
            self.keyframes.pts.append(packet.pts)
            self.keyframes.seek.append(packet.pts if packet.dts is None else packet.dts)
            if packet in self._entry_points:
                self.keyframes.entries.append(packet.pts)
        if packet.is_discard:
            return
        if self._last_pts is None or packet.pts >= self._last_pts:
            self._last_pts, self.last_duration = packet.pts, packet.duration or 0
        self.pts.append(packet.pts)

    def wants_frames(self) -> bool:
        if self.first is None:
            return True
        return len(self._head) < (_HEAD_FRAMES_INTERLACED if self.first.interlaced_frame else _HEAD_FRAMES)

    def add_frame(self, frame: VideoFrame) -> None:
        if self.first is None:
            if frame.is_corrupt:
                return
            self.first = frame
        self._head.append(frame.pts)

    def frame_times(self, stream: VideoStream) -> FrameTimes | None:
        """Times from the packets; None where the decoded head shows that they cannot be believed."""
        head = self._head
        if not self.trustworthy or not self.pts or any(pts is None for pts in head):
            return None
        shown = sorted(pts for pts in self.pts if head[0] <= pts <= head[-1])  # type: ignore[operator]
        if shown != head or stream.time_base is None:
            return None
        self.start_pts = shown[0]
        ticks = sorted({pts for pts in self.pts if pts >= self.start_pts})
        return FrameTimes((pts - self.start_pts for pts in ticks), stream.time_base)


def _scan_packets(container: InputContainer, stream: VideoStream) -> _PacketScan:
    """Demux the whole stream; decode only until the head is complete."""
    scan = _PacketScan(EntryPoints(stream))
    # Slice threads only: with frame threads the head would cost a pipeline of frames.
    stream.thread_type = "SLICE"

    def unreadable() -> None:
        scan.unreadable = True

    def counted() -> Iterator[Packet]:
        for packet in packets:
            scan.add_packet(packet)
            yield packet

    packets = read_packets(container, stream, unreadable)
    for frame in decode_packets(stream, counted(), lambda _: None):
        scan.add_frame(frame)
        if not scan.wants_frames():
            break
    for packet in packets:
        scan.add_packet(packet)
    return scan


def _times_by_decoding(path: Path) -> tuple[FrameTimes, int]:
    """Times of all frames in the order they are decoded, and the last one's duration in ticks."""
    container, stream = open_video(path)
    with container:
        stream.thread_type = (
            "SLICE"  # frame threads drop whole frames around damage, and the count must not depend on it
        )
        packets = read_packets(container, stream, lambda: None)
        found: list[int | None] = []
        duration = 0
        for frame in decode_packets(stream, packets, lambda _: None):
            found.append(frame.pts)
            duration = frame.duration or duration
        time_base = stream.time_base or Fraction(1, 90_000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        step = max(1, round(1 / (rate * time_base)))
    ticks = _repair_ticks(found, step)
    return FrameTimes((tick - ticks[0] for tick in ticks), time_base), duration or step


def _repair_ticks(found: Sequence[int | None], step: int) -> list[int]:
    """Strictly ascending ticks for frames in presentation order.

    A container that stores decoding times only gives the right set of times in a slightly wrong order:
    sorting mends it. Otherwise a missing time, or one that does not come after its predecessor, is one
    `step` later, and what follows is moved along.
    """
    known = [tick for tick in found if tick is not None]
    if len(known) == len(found) and len(set(known)) == len(known):
        ordered = sorted(known)
        if all(abs(bisect_left(ordered, tick) - i) <= _REORDER_FRAMES for i, tick in enumerate(known)):
            return ordered
    ticks: list[int] = []
    shift = 0
    for tick in found:
        if not ticks:
            ticks.append(tick or 0)
            continue
        follow = ticks[-1] + step
        if tick is None:
            ticks.append(follow)
            continue
        if tick + shift <= ticks[-1]:
            shift = follow - tick
        ticks.append(tick + shift)
    return ticks


def _info_of_video(
    path: Path,
    format_name: str,
    stream: VideoStream,
    scan: _PacketScan,
    times: FrameTimes,
) -> VideoInfo:
    first = scan.first
    assert first is not None
    kind: Literal["video", "animation", "image"] = "animation" if format_name in _ANIMATIONS else "video"
    if len(times) == 1 and (kind == "animation" or format_name.endswith("_pipe") or format_name == "image2"):
        kind = "image"
    rotation, mirrored = _orientation(first)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 100) <= aspect <= 100:
        aspect = Fraction(1)
    shown_width, shown_height = max(1, round(first.width * aspect)), first.height
    if rotation % 180:
        shown_width, shown_height = shown_height, shown_width
    rate = _average_rate(times)
    last_s = scan.last_duration * times.time_base or (1 / rate if rate else 0)
    if not last_s and (stated := stream.average_rate):
        last_s = 1 / stated
    duration_s = Fraction(0) if kind == "image" else times[-1] + last_s
    return VideoInfo(
        path=path,
        kind=kind,
        width=shown_width,
        height=shown_height,
        coded_width=first.width,
        coded_height=first.height,
        rotation_degrees=rotation,
        pixel_aspect=aspect,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=first.format.name,
        interlaced=first.interlaced_frame or stream.codec_context.field_order > 1,
        transfer=transfer_of(first.color_trc),
        frame_times=times,
        duration_s=duration_s,
        average_rate=rate,
        truncated_at_s=duration_s if scan.unreadable else None,
        mirrored=mirrored,
        matching=scan.matching,
        start_pts=scan.start_pts,
        keyframes=scan.keyframes if scan.matching == "pts" else Keyframes(),
    )


def _info_of_image(path: Path, header: ImageHeader) -> VideoInfo:
    durations = header.durations_ms or (0,)
    starts = [sum(durations[:i]) for i in range(len(durations))]
    times = FrameTimes(starts, Fraction(1, 1000))
    turned = header.rotation_degrees % 180 != 0
    return VideoInfo(
        path=path,
        kind="animation" if header.durations_ms else "image",
        width=header.height if turned else header.width,
        height=header.width if turned else header.height,
        coded_width=header.width,
        coded_height=header.height,
        rotation_degrees=header.rotation_degrees,
        pixel_aspect=Fraction(1),
        codec=header.format,
        pixel_format=header.mode,
        interlaced=False,
        transfer="sdr",
        frame_times=times,
        duration_s=Fraction(sum(durations), 1000),
        average_rate=_average_rate(times),
        mirrored=header.mirrored,
        reader="pillow",
        matching="order",
    )


def _average_rate(times: FrameTimes) -> Fraction:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else Fraction(0)


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Clockwise degrees, and mirroring before it, of the display matrix, to the nearest right angle.

    With ``[a b u; c d v; x y w]`` a stored point (x, y), y downwards, is shown at (a·x + c·y, b·x + d·y).
    """
    side_data: Any = frame.side_data
    matrix = next((bytes(data) for data in side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None or len(matrix) < 36:
        return 0, False
    a, b, _, c, d, _, _, _, _ = struct.unpack("<9i", matrix[:36])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    if abs(a) >= abs(b):
        return (0 if a >= 0 else 180), mirrored
    return (90 if b > 0 else 270), mirrored
