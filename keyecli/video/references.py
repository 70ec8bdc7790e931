"""Tells from the packets of H.264 and HEVC which pictures no other picture is predicted from, by the standards' own marks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from av import Packet, VideoStream

_SELF_CONTAINED = {"vp9", "av1", "mjpeg", "prores", "dnxhd", "ffv1"}
"""Codecs other than H.264 and HEVC whose keyframes make decoding independent of what came before."""

_HEADER_BYTES = 24  # enough of a slice for the fields read here
_USER_DATA = {4, 5}  # supplemental messages that stay with their own picture, such as captions
_FILM_GRAIN = 19  # its noise depends on how many pictures were decoded before
_H264_HIGH_PROFILES = {100, 110, 122, 44, 83, 86, 118, 128, 138, 139, 134, 135}
_H264_LOSSLESS_444 = 244


class UnknownStructureError(Exception):
    """The stream does not mark its references in the ways that are understood here: decode every packet of it."""


class References(Protocol):
    """Reads a stream's packets in decoding order."""

    def begin(self, data: bytes) -> None:
        """Go on at this keyframe's packet, which `is_needed` reads next; UnknownStructureError unless all pictures
        from it on, in presentation order, can be decoded exactly without what comes before."""

    def is_needed(self, data: bytes) -> bool:
        """Whether decoding any other picture needs this packet; UnknownStructureError where that cannot be said."""


def references_of(stream: VideoStream) -> References | None:
    """What reads this stream, or None for other codecs; UnknownStructureError for streams of a kind not understood."""
    context = stream.codec_context
    extradata = bytes(context.extradata or b"")
    if context.codec.canonical_name == "h264":
        return _H264References(extradata)
    if context.codec.canonical_name == "hevc":
        return _HevcReferences(extradata)
    return None


class EntryPoints:
    """Says of keyframes whether decoding that begins there gives exactly the pictures of decoding from the start."""

    def __init__(self, stream: VideoStream) -> None:
        self._any = stream.codec_context.codec.canonical_name in _SELF_CONTAINED
        try:
            self._references = references_of(stream)
        except UnknownStructureError:
            self._references = None

    def __contains__(self, packet: Packet) -> bool:
        if self._references is None:
            return self._any
        try:
            self._references.begin(bytes(packet))
        except UnknownStructureError:
            return False
        return True


class _Bits:
    """Reads a NAL unit's fields, most significant bit first; UnknownStructureError past its end."""

    def __init__(self, unit: bytes) -> None:
        payload = unit.replace(b"\0\0\3", b"\0\0")  # bytes that only keep start codes out
        self._value = int.from_bytes(payload, "big")
        self._left = len(payload) * 8

    def take(self, count: int) -> int:
        """An unsigned number of `count` bits."""
        self._left -= count
        if self._left < 0:
            raise UnknownStructureError
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb number; also skips a signed one."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def signed_golomb(self) -> int:
        """A signed Exp-Golomb number."""
        code = self.golomb()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def _units(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """The NAL units of a packet, either each behind its length or, where `length_bytes` is 0, behind start codes."""
    if length_bytes:
        start = 0
        while start < len(data):
            end = start + length_bytes + int.from_bytes(data[start : start + length_bytes], "big")
            if end > len(data) or end == start + length_bytes:
                raise UnknownStructureError
            yield data[start + length_bytes : end]
            start = end
        return
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        unit = data[start + 3 : end if end >= 0 else len(data)].rstrip(b"\0")
        if not unit:
            raise UnknownStructureError
        yield unit
        start = end


def _messages(unit: bytes, header_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each supplemental message in a NAL unit."""
    data = unit[header_bytes:].replace(b"\0\0\3", b"\0\0")
    place = 0
    while place < len(data) and data[place:] != b"\x80":
        numbers = []
        for _ in range(2):
            number = 0
            while place < len(data) and data[place] == 255:
                number, place = number + 255, place + 1
            if place >= len(data):
                raise UnknownStructureError
            numbers.append(number + data[place])
            place += 1
        kind, size = numbers
        if place + size > len(data):
            raise UnknownStructureError
        yield kind, data[place : place + size]
        place += size


class _H264References:
    """A picture is not needed when all of its slices have nal_ref_idc 0.

    Only progressive streams without gaps in frame_num: there, every reference picture raises frame_num by
    one, so that a picture missing or mistaken for another kind shows.
    """

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = (extradata[4] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 6 else 0
        self._frame_number_bits = 0
        self._frame_number: int | None = None  # of the last reference picture
        if self._length_bytes:
            place = 6
            for _ in range(extradata[5] & 31):
                size = int.from_bytes(extradata[place : place + 2], "big")
                self._read_parameters(extradata[place + 2 : place + 2 + size])
                place += 2 + size
        else:
            for unit in _units(extradata, 0):
                if unit[0] & 31 == 7:
                    self._read_parameters(unit)

    def begin(self, data: bytes) -> None:
        self._frame_number = None
        exact = False
        for unit in _units(data, self._length_bytes):
            kind = unit[0] & 31
            if kind == 6:
                for message, payload in _messages(unit, 1):
                    if message == 6:  # recovery point
                        bits = _Bits(payload)
                        exact |= bits.golomb() == 0 and bits.take(1) == 1
            elif kind == 5:
                exact = True
        if not exact:
            raise UnknownStructureError

    def is_needed(self, data: bytes) -> bool:
        picture: tuple[bool, bool, int] | None = None  # is IDR, is a reference, frame_num
        beside = False
        for unit in _units(data, self._length_bytes):
            kind = unit[0] & 31
            if kind in (1, 5):
                is_reference = unit[0] & 0x60 != 0
                bits = _Bits(unit[1:_HEADER_BYTES])
                first_macroblock, _, _ = bits.golomb(), bits.golomb(), bits.golomb()
                found = (kind == 5, is_reference, bits.take(self._frame_number_bits))
                if (picture is None) != (first_macroblock == 0) or (picture or found) != found:
                    raise UnknownStructureError
                picture = found
            elif kind == 6:
                for message, _ in _messages(unit, 1):
                    if message == _FILM_GRAIN:
                        raise UnknownStructureError
                    beside |= (
                        message not in _USER_DATA and message != 1
                    )  # picture timing: pic_struct is ruled out
            elif kind == 7:
                self._read_parameters(unit)
                beside = True
            elif kind in (2, 3, 4, 14, 15, 20, 21):  # data partitions, layers, views
                raise UnknownStructureError
            elif kind not in (9, 12):  # delimiter, filler
                beside = True
        if picture is None or not self._frame_number_bits:
            raise UnknownStructureError
        self._check_frame_number(*picture)
        return picture[1] or beside

    def _check_frame_number(self, is_idr: bool, is_reference: bool, number: int) -> None:
        if is_idr or self._frame_number is None:
            if is_idr and (number or not is_reference):
                raise UnknownStructureError
        elif number != (self._frame_number + 1) % (1 << self._frame_number_bits):
            raise UnknownStructureError
        if is_reference:
            self._frame_number = number

    def _read_parameters(self, unit: bytes) -> None:
        """Sequence parameter set: frame_num's length, and whether the stream is of a kind understood here."""
        bits = _Bits(unit[1:])
        profile = bits.take(8)
        bits.take(16)
        bits.golomb()
        if profile in _H264_HIGH_PROFILES:
            chroma = bits.golomb()
            bits.golomb(), bits.golomb(), bits.take(1)
            if chroma == 3:
                raise UnknownStructureError
            if bits.take(1):
                for size in (16,) * 6 + (64,) * 2:
                    if bits.take(1):
                        _skip_scaling_list(bits, size)
        frame_number_bits = bits.golomb() + 4
        order = bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.take(1), bits.golomb(), bits.golomb()
            for _ in range(bits.golomb()):
                bits.golomb()
        bits.golomb()
        gaps = bits.take(1)
        bits.golomb(), bits.golomb()
        progressive = bits.take(1)
        if profile == _H264_LOSSLESS_444 or gaps or not progressive or _has_picture_structure(bits):
            raise UnknownStructureError
        if self._frame_number_bits not in (0, frame_number_bits):
            raise UnknownStructureError
        self._frame_number_bits = frame_number_bits


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed_golomb()) % 256
        last = following or last


def _has_picture_structure(bits: _Bits) -> bool:
    """pic_struct_present_flag of an H.264 sequence, read from direct_8x8_inference_flag on."""
    bits.take(1)
    if bits.take(1):
        for _ in range(4):
            bits.golomb()
    if not bits.take(1):
        return False
    if bits.take(1) and bits.take(8) == 255:
        bits.take(32)
    if bits.take(1):
        bits.take(1)
    if bits.take(1):
        bits.take(4)
        if bits.take(1):
            bits.take(24)
    if bits.take(1):
        bits.golomb(), bits.golomb()
    if bits.take(1):
        bits.take(65)
    buffered = False
    for _ in range(2):
        if bits.take(1):
            buffered = True
            count = bits.golomb() + 1
            bits.take(8)
            for _ in range(count):
                bits.golomb(), bits.golomb(), bits.take(1)
            bits.take(20)
    if buffered:
        bits.take(1)
    return bits.take(1) == 1


class _HevcReferences:
    """A picture is not needed when it is a sub-layer non-reference picture of the highest temporal layer.

    The decoder itself refuses a picture whose references are missing, so a mistake would show.
    """

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = (extradata[21] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 22 else 0
        self._highest_layer: int | None = None
        self._timed: bool | None = None
        if self._length_bytes:
            place = 23
            for _ in range(extradata[22]):
                count = int.from_bytes(extradata[place + 1 : place + 3], "big")
                place += 3
                for _ in range(count):
                    size = int.from_bytes(extradata[place : place + 2], "big")
                    unit = extradata[place + 2 : place + 2 + size]
                    if len(unit) > 2 and unit[0] >> 1 & 63 == 33:
                        self._read_parameters(unit)
                    place += 2 + size
        else:
            for unit in _units(extradata, 0):
                if len(unit) > 2 and unit[0] >> 1 & 63 == 33:
                    self._read_parameters(unit)

    def begin(self, data: bytes) -> None:
        kinds = {unit[0] >> 1 & 63 for unit in _units(data, self._length_bytes)}
        pictures = {kind for kind in kinds if kind < 32}
        if not pictures or not pictures <= set(range(16, 22)):
            raise UnknownStructureError

    def is_needed(self, data: bytes) -> bool:
        slices: set[int] = set()
        needed = timed = False
        for unit in _units(data, self._length_bytes):
            if len(unit) < 3:
                raise UnknownStructureError
            kind, layer = unit[0] >> 1 & 63, (unit[1] & 7) - 1
            if (unit[0] & 1) << 5 | unit[1] >> 3:  # views, scalable layers, alpha
                raise UnknownStructureError
            if kind < 32:
                if (unit[2] & 0x80 != 0) == bool(slices):  # only the first slice is marked as first
                    raise UnknownStructureError
                slices.add(kind)
                needed |= kind >= 16 or kind % 2 == 1 or layer != self._highest_layer
            elif kind in (39, 40):
                for message, _ in _messages(unit, 2):
                    if message == _FILM_GRAIN:
                        raise UnknownStructureError
                    timed |= message == 1
                    needed |= message not in _USER_DATA and message not in (1, 132)  # timing, picture hash
            elif kind == 33:
                self._read_parameters(unit)
                needed = True
            elif kind not in (35, 38, 62):  # delimiter, filler, Dolby Vision
                needed = True
        # The decoder takes a picture without timing as timed like the one before.
        if len(slices) != 1 or self._timed not in (None, timed):
            raise UnknownStructureError
        self._timed = timed
        return needed

    def _read_parameters(self, unit: bytes) -> None:
        """Sequence parameter set: how many temporal layers there are."""
        highest = unit[2] >> 1 & 7
        if self._highest_layer not in (None, highest):
            raise UnknownStructureError
        self._highest_layer = highest
