"""Tells from a container's own size fields whether a file was cut off; nothing is demuxed here."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, Literal

Integrity = Literal["whole", "cut", "cut before index"]

_EBML_HEADER = 0x1A45DFA3
_EBML_SEGMENT = 0x18538067
_BOX_NAMES = {
    b"ftyp",
    b"moov",
    b"mdat",
    b"free",
    b"skip",
    b"wide",
    b"moof",
    b"styp",
    b"sidx",
    b"uuid",
    b"pnot",
    b"meta",
}


def check_integrity(path: Path) -> Integrity:
    """Whether the file ends where its header says it does.

    Known: MP4 and MOV (top-level boxes), Matroska and WebM (segment size), AVI and WebP (RIFF size), GIF
    (trailer), MPEG-TS (whole packets of 188 bytes). "cut before index": an MP4 that ends before its `moov`
    box. Other containers declare no size and count as whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _BOX_NAMES:
            return _check_boxes(file, size)
        if head[:4] == _EBML_HEADER.to_bytes(4, "big"):
            return _check_segment(file, size)
        if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP"):
            return "cut" if _riff_end(file, size) > size else "whole"
        if head[:6] in (b"GIF87a", b"GIF89a"):
            file.seek(max(0, size - 1024))
            return "whole" if b"\x3b" in file.read()[-1024:].rstrip(b"\0")[-1:] else "cut"
        if head[:1] == b"\x47" and _is_transport_stream(file, size):
            return "cut" if size % 188 else "whole"
    return "whole"


def _check_boxes(file: BinaryIO, size: int) -> Integrity:
    """Walk the top-level boxes: 32-bit size (1: a 64-bit one follows, 0: to the end of the file), then the name."""
    offset, has_index = 0, False
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        length, name = struct.unpack(">I4s", header[:8])
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        elif length == 0:
            length = size - offset
        if length < 8:
            return "whole"  # trailing bytes that are no box
        cut = offset + length > size
        has_index |= name == b"moov" and not cut
        if cut:
            known = name in _BOX_NAMES
            return ("cut" if has_index else "cut before index") if known else "whole"
        offset += length
    return "whole" if has_index else "cut before index"


def _check_segment(file: BinaryIO, size: int) -> Integrity:
    """Compare the Segment's size with the file's; an unknown size (live recordings) counts as whole."""
    file.seek(0)
    while (element := _read_element(file)) is not None:
        identifier, length = element
        if identifier == _EBML_SEGMENT:
            return "cut" if length is not None and file.tell() + length > size else "whole"
        if length is None:
            return "whole"
        file.seek(length, os.SEEK_CUR)
    return "cut"


def _read_element(file: BinaryIO) -> tuple[int, int | None] | None:
    """Id and size (None: unknown) of the EBML element that starts here; None at the end of the file."""
    values: list[int | None] = []
    for is_identifier in (True, False):
        first = file.read(1)
        if not first or not first[0]:
            return None
        width = 9 - first[0].bit_length()
        raw = first + file.read(width - 1)
        if len(raw) < width:
            return None
        value = int.from_bytes(raw, "big")
        if not is_identifier:
            value &= (1 << 7 * width) - 1
        unknown = not is_identifier and value == (1 << 7 * width) - 1
        values.append(None if unknown else value)
    identifier, length = values
    return (identifier, length) if identifier is not None else None


def _riff_end(file: BinaryIO, size: int) -> int:
    """Where the last RIFF chunk (large AVI files have several) says the file ends."""
    end = 0
    while end + 12 <= size:
        file.seek(end)
        name, length = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF" or length == 0:
            break
        end += 8 + length
    return end


def _is_transport_stream(file: BinaryIO, size: int) -> bool:
    """Sync bytes at the start of the first packets."""
    for packet in range(min(5, size // 188)):
        file.seek(188 * packet)
        if file.read(1) != b"\x47":
            return False
    return size >= 188
