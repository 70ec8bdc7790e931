"""Decodes wanted frames keyframe by keyframe: in parallel, without the packets that nothing wanted needs."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from keyecli.video.parallel import in_order
from keyecli.video.references import References, UnknownStructureError, references_of
from keyecli.video.source import VideoInfo, open_video, read_packets

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

Convert = Callable[["VideoFrame"], np.ndarray]

_MOST_THREADS = 8
_DECODER_BYTES = 2**30  # of pictures in all decoders together
_DECODER_PICTURES = 20  # that one decoder holds
_WAITING_BYTES = 2**25  # of converted pictures that wait to be taken
_READ_ON_BYTES = 2**20  # reading so much costs less than a seek


@dataclass(frozen=True)
class Stretch:
    """Wanted frames that decoding from an entry point gives; all by pts, ascending."""

    entry: int
    wanted: tuple[int, ...]


class UnplannedError(Exception):
    """Something other than the wanted frames, each whole and in its place, came out of the decoder."""


def split_at_entries(info: VideoInfo, wanted: Sequence[int]) -> list[Stretch]:
    """The wanted frames' stretches; empty when the file is of a kind that must be decoded in one sequence."""
    entries = info.keyframes.entries
    if info.matching != "pts" or info.interlaced or not entries or wanted[0] < entries[0]:
        return []
    stretches: list[Stretch] = []
    begin = 0
    while begin < len(wanted):
        number = bisect_right(entries, wanted[begin])
        end = bisect_left(wanted, entries[number], begin) if number < len(entries) else len(wanted)
        stretches.append(Stretch(entries[number - 1], tuple(wanted[begin:end])))
        begin = end
    return stretches


def decode_stretches(
    info: VideoInfo, stretches: Sequence[Stretch], converter: Callable[[], Convert], picture_bytes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(pts, picture) of the wanted frames, in order, each exactly as decoding the whole file gives it.

    `converter()` makes what turns a frame into a picture of about `picture_bytes`, one for each thread. Ends
    early, after a whole number of frames, at the first that is damaged, interlaced, missing or out of order,
    and where the stream's structure is not understood; the rest must be decoded in another way.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    decoder_bytes = info.coded_width * info.coded_height * 3 * _DECODER_PICTURES
    threads = max(1, min(len(stretches), cores, _MOST_THREADS, _DECODER_BYTES // decoder_bytes))

    # One more than there are cores for it: the frames of a pipeline wait for each other, and the last stretch is then not
    # left to one core.
    decoder_threads = cores // threads + 1

    @contextmanager
    def worker() -> Iterator[Callable[[Stretch], Iterator[tuple[int, np.ndarray]]]]:
        container, stream = open_video(info.path)
        with container:
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = decoder_threads
            decoder, convert = _StretchDecoder(info, container, stream), converter()

            def pictures(stretch: Stretch) -> Iterator[tuple[int, np.ndarray]]:
                return ((pts, convert(frame)) for pts, frame in decoder.frames(stretch))

            yield pictures

    room = max(4, _WAITING_BYTES // picture_bytes)
    try:
        yield from in_order(stretches, worker, threads=threads, room=room)
    except (UnplannedError, UnknownStructureError):
        return


class _StretchDecoder:
    """Decodes stretches of one open file, in any order."""

    def __init__(self, info: VideoInfo, container: InputContainer, stream: VideoStream) -> None:
        self._info = info
        self._container, self._stream = container, stream
        self._references: References | None = references_of(stream)
        self._packet_bytes = info.path.stat().st_size // len(info.frame_times)
        self._packets = self._read()
        self._passed: int | None = None  # pts of the last keyframe read

    def frames(self, stretch: Stretch) -> Iterator[tuple[int, VideoFrame]]:
        """(pts, frame) of each wanted frame; UnplannedError, UnknownStructureError."""
        behind: dict[int, int] = {}
        ready: deque[tuple[int, VideoFrame]] = deque()
        position = 0
        for frame in self._decoded(stretch, behind):
            if frame.pts is None:
                raise UnplannedError
            if frame.pts < stretch.entry:  # may lack its references
                continue
            if frame.is_corrupt or frame.interlaced_frame:
                raise UnplannedError
            if position < len(stretch.wanted) and frame.pts >= stretch.wanted[position]:
                if frame.pts != stretch.wanted[position]:
                    raise UnplannedError
                ready.append((frame.pts, frame))
                position += 1
            # A frame's references may be shown after it: it is good once they have all come out whole.
            while ready and behind[ready[0][0]] <= frame.pts:
                yield ready.popleft()
            if position == len(stretch.wanted) and not ready:
                return
        raise UnplannedError

    def _decoded(self, stretch: Stretch, behind: dict[int, int]) -> Iterator[VideoFrame]:
        """Frames in presentation order, among them the wanted ones; no packet is read behind the last that is wanted.

        `behind` is told, for each wanted frame's pts, the last pts that is decoded before it.
        """
        import av

        missing, last = set(stretch.wanted), stretch.wanted[-1]
        latest = stretch.entry
        try:
            for packet in self._packets_from(stretch.entry):
                if packet.is_corrupt or packet.pts is None or (packet.dts is not None and packet.dts > last):
                    raise UnplannedError
                needed = self._references is None or self._references.is_needed(bytes(packet))
                if not needed and packet.pts not in missing:
                    continue
                latest = max(latest, packet.pts)
                if packet.pts in missing:
                    missing.remove(packet.pts)
                    behind[packet.pts] = latest
                yield from packet.decode()
                if not missing:
                    break
            yield from self._stream.decode(None)
        except av.error.FFmpegError as error:
            raise UnplannedError from error

    def _packets_from(self, pts: int) -> Iterator[Packet]:
        """Packets from this entry point on, for a decoder that holds nothing of earlier ones."""
        if self._is_far(pts):
            keyframes = self._info.keyframes
            position = keyframes.seek[keyframes.at_or_before(pts)]
            self._container.seek(position, stream=self._stream, backward=True)
            self._packets = self._read()
        else:
            self._stream.codec_context.flush_buffers()
        begun = False
        for packet in self._packets:  # not `yield from`, which would end it when this ends
            if not begun and packet.is_keyframe and packet.pts is not None and packet.pts >= pts:
                if packet.pts != pts:
                    raise UnplannedError
                if self._references is not None:
                    self._references.begin(bytes(packet))
                begun = True
            if begun:
                yield packet

    def _is_far(self, pts: int) -> bool:
        """Whether a seek leads to this keyframe sooner than reading on does."""
        if self._passed is not None and pts <= self._passed:
            return True
        ticks, start = self._info.frame_times.ticks, self._info.start_pts
        reached = start if self._passed is None else self._passed
        between = bisect_left(ticks, pts - start) - bisect_left(ticks, reached - start)
        return between * self._packet_bytes > _READ_ON_BYTES

    def _read(self) -> Iterator[Packet]:
        for packet in read_packets(self._container, self._stream, lambda: None):
            if packet.is_keyframe and packet.pts is not None:
                self._passed = packet.pts
            yield packet
