"""Turns interlaced frames into whole pictures, one for each frame, at the same presentation time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import VideoFrame
    from av.filter import Graph


def deinterlace(frames: Iterable[VideoFrame], time_base: Fraction) -> Iterator[VideoFrame]:
    """The frames in their order with their `pts` (units of `time_base` seconds), interlaced ones rebuilt by FFmpeg's bwdif.

    bwdif completes the first field from its neighbours in space and time, so it needs the next frame:
    output runs one frame behind. Frames that are not marked interlaced pass unchanged, and until the first
    marked one arrives nothing is filtered or delayed.
    """
    graph: Graph | None = None
    layout: tuple[int, int, str] | None = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None or layout != _layout(frame):
            if graph is not None:
                yield from _drain(graph, time_base)
            graph, layout = _graph(frame, time_base), _layout(frame)
        graph.vpush(frame)
        yield from _pull(graph, time_base)
    if graph is not None:
        yield from _drain(graph, time_base)


def _layout(frame: VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _graph(frame: VideoFrame, time_base: Fraction) -> Graph:
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=time_base
    )
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"), graph.add("buffersink")
    )
    graph.configure()
    return graph


def _drain(graph: Graph, time_base: Fraction) -> Iterator[VideoFrame]:
    graph.vpush(None)
    yield from _pull(graph, time_base)


def _pull(graph: Graph, time_base: Fraction) -> Iterator[VideoFrame]:
    import av

    while True:
        try:
            frame = graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        # The filter counts in half ticks, so that it could place a second field between two frames.
        if frame.pts is not None and frame.time_base:
            frame.pts = round(frame.pts * frame.time_base / time_base)
        yield frame
