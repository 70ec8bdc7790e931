"""What an editor wants to know of a clip's sound: how many channels it has, and how fast it is sampled."""

from __future__ import annotations

from dataclasses import dataclass

from keyecli.errors import InputError
from keyecli.video.source import VideoInfo


@dataclass(frozen=True)
class Sound:
    """The clip's first audio track: channels, and samples a second."""

    channels: int
    rate: int


def sound_of(info: VideoInfo) -> Sound | None:
    """The sound of a probed clip, None where it has none. InputError when the file is not there any more."""
    if info.reader != "ffmpeg":
        return None
    import av

    options = {"protocol_whitelist": "file", "pattern_type": "none"}
    try:
        with av.open(f"file:{info.path}", options=options, metadata_errors="replace") as file:
            streams = [stream for stream in file.streams.audio if stream.channels and stream.rate]
            return Sound(streams[0].channels, streams[0].rate) if streams else None
    except av.error.FFmpegError as error:
        raise InputError(f"{info.path} can no longer be read; did it change?") from error
