"""Weights from their shards to their places: several threads read ahead, into a bounded buffer or where a tensor is to be.

A single reader, or pages that a copy faults in one after the other, leave a fast disk idle most of the time. Tensors are read in
pieces: rows of the tensor as the files hold it, each of which is copied, transposed or quantised without the others.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keyecli.errors import MemoryLimitError, ModelError
from keyecli.kernels.quantized_weights import quantise
from keyecli.model.offload import pinned_tensor
from keyecli.model.placement import WeightPlaces, one_device
from keyecli.model.quantize import STORED_PARTS, Quantized
from keyecli.model.shards import TensorEntry, one_line

if TYPE_CHECKING:
    from keyecli.model.checkpoint import LoadPlan, Placement

READERS = 8
PIECE_BYTES = 8 << 20
# Pieces that are being read or wait for their turn, two for each reader; the buffer has room for them and for some that a GPU
# still copies from.
PIECES_AHEAD = 2 * READERS
SLOTS = PIECES_AHEAD + READERS // 2

# The types in which official files store weights; anything else in a shard is a quantised or foreign model.
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# The types of what our quantised folders hold beside them.
STORED_DTYPES = {"I32": torch.int32, "U8": torch.uint8}


@dataclass
class _Target:
    """Tensors that are being filled, and how many tensors of the files are still to come for them."""

    tensors: dict[str, Tensor]
    left: int


@dataclass(frozen=True)
class _Piece:
    """Rows `begin` to `end` of the tensor `name` of the files, seen as [rows, ...]; the last piece of a tensor ends it."""

    name: str
    begin: int
    end: int
    row_bytes: int
    is_last: bool

    @property
    def bytes(self) -> int:
        return (self.end - self.begin) * self.row_bytes


@dataclass
class _Slot:
    """A piece's room in the buffer, and when what copies from it has been done."""

    memory: Tensor
    copied: torch.cuda.Event | None = None


def stream_weights(
    plan: LoadPlan,
    device: torch.device | str | WeightPlaces,
    dtype: torch.dtype | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model's state, each whole, as their shards hold them, on `device` in `dtype` (None: as stored).

    What is quantised has types of its own. Copies to a GPU may still be under way on its current stream. `on_progress(done,
    total)` is told the bytes. ModelError for a shard that cannot be read and a value that cannot be quantised.
    """
    places = device
    if not isinstance(places, WeightPlaces):
        places = one_device(places, plan.model.config.num_hidden_layers)
    stream = _Stream(plan, places, dtype)
    try:
        total, done = plan.read_bytes, 0
        for piece in stream.pieces():
            done += piece.bytes
            placement = plan.placements[piece.name]
            target = stream.targets[placement.parameter]
            target.left -= piece.is_last
            if target.left == 0:
                del target
                yield from stream.targets.pop(placement.parameter).tensors.items()
            if on_progress is not None and piece.bytes:
                on_progress(done, total)
    finally:
        stream.close()


class _Stream:
    """Pieces of a plan's tensors, read ahead in their order and put into the targets that they belong to."""

    def __init__(self, plan: LoadPlan, places: WeightPlaces, dtype: torch.dtype | None) -> None:
        self.targets: dict[str, _Target] = {}
        self._plan, self._places, self._dtype = plan, places, dtype
        self._sources: defaultdict[str, int] = defaultdict(int)
        for placement in plan.placements.values():
            self._sources[placement.parameter] += 1
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._slot_bytes = max((next(_pieces_of(plan, name)).bytes for name in plan.placements), default=0)
        self._slots: list[_Slot] = []
        self._free: deque[_Slot] = deque()

    def pieces(self) -> Iterator[_Piece]:
        """Each piece when it is where it belongs."""
        waiting: deque[tuple[_Piece, _Slot | None, Future[None]]] = deque()
        for piece in self._planned():
            if len(waiting) == PIECES_AHEAD:
                yield self._placed(*waiting.popleft())
            waiting.append(self._begin(piece))
        while waiting:
            yield self._placed(*waiting.popleft())

    def close(self) -> None:
        """Wait for readers and copies: both hold memory of the buffer."""
        self._readers.shutdown(cancel_futures=True)
        for slot in self._slots:
            if slot.copied is not None:
                slot.copied.synchronize()

    def _planned(self) -> Iterator[_Piece]:
        """All pieces, shard by shard; ModelError for a shard whose header contradicts itself."""
        by_shard: defaultdict[Path, list[str]] = defaultdict(list)
        for name in self._plan.placements:
            by_shard[self._plan.entries[name].shard].append(name)
        for shard, names in by_shard.items():
            try:
                with safe_open(shard, framework="pt", device="cpu"):
                    pass
            except (SafetensorError, OSError) as error:
                raise _unreadable(shard, error) from error
            for name in names:
                yield from _pieces_of(self._plan, name)

    def _begin(self, piece: _Piece) -> tuple[_Piece, _Slot | None, Future[None]]:
        """Let a piece be read: into its target, where the file's bytes are the target's own, else into the buffer."""
        name = piece.name
        placement, entry = self._plan.placements[name], self._plan.entries[name]
        target = self.targets.get(placement.parameter)
        if target is None:
            made = _empty_tensors(self._plan, name, placement.parameter, self._places, self._dtype)
            target = self.targets[placement.parameter] = _Target(made, self._sources[placement.parameter])
        slot, copied = None, None
        whole = target.tensors.get(placement.parameter) if placement.expert is None else None
        if whole is not None and whole.device.type == "cpu" and whole.dtype is _dtype_of(entry):
            memory = whole.view(-1).view(torch.uint8)[piece.begin * piece.row_bytes :][: piece.bytes]
        else:
            slot = self._free_slot()
            memory, copied = slot.memory[: piece.bytes], slot.copied
        offset = entry.offset + piece.begin * piece.row_bytes
        return piece, slot, self._readers.submit(_read, entry.shard, offset, memory, copied)

    def _free_slot(self) -> _Slot:
        """Room that nothing is read into; what copies from it may not be done yet."""
        if len(self._slots) < SLOTS:
            self._slots.append(_Slot(_host_memory(self._slot_bytes, self._places)))
            return self._slots[-1]
        return self._free.popleft()

    def _placed(self, piece: _Piece, slot: _Slot | None, read: Future[None]) -> _Piece:
        """Wait for a piece and put it into its target."""
        entry = self._plan.entries[piece.name]
        try:
            read.result()
        except OSError as error:
            raise _unreadable(entry.shard, error) from error
        if slot is not None:
            self._fill(slot.memory[: piece.bytes].view(_dtype_of(entry)), piece)
            slot.copied = None
            device = self._places.device_of(self._plan.placements[piece.name].parameter)
            if device.type == "cuda":
                slot.copied = torch.cuda.current_stream(device).record_event()
            self._free.append(slot)
        return piece

    def _fill(self, values: Tensor, piece: _Piece) -> None:
        """Convert, transpose or quantise a piece's values, which are one behind the other in the buffer, into its target.

        They are moved first: a GPU does all of it faster than the host.
        """
        placement = self._plan.placements[piece.name]
        tensors = self.targets[placement.parameter].tensors
        if placement.parameter in self._plan.quantised:
            device = self._places.device_of(placement.parameter)
            parts = {part.rpartition(".")[2]: tensor for part, tensor in tensors.items()}
            self._quantise(parts, values.to(device, non_blocking=True), piece, placement)
            return
        target = tensors[placement.parameter]
        values = values.to(target.device, non_blocking=True)
        if placement.expert is None:
            target.view(-1)[piece.begin : piece.end].copy_(values)
        else:
            first, columns = placement.first_column + piece.begin, piece.end - piece.begin
            rows = values.view(columns, placement.shape[1])
            target[placement.expert].narrow(1, first, columns).copy_(rows.t())

    def _quantise(
        self, parts: dict[str, Tensor], values: Tensor, piece: _Piece, placement: Placement
    ) -> None:
        """Quantise rows of one tensor [out, in], of one expert's, or whole experts of a fused one [E, in, out]."""
        quantization = self._plan.quantization
        assert quantization is not None
        matrices: list[tuple[Any, Tensor]]
        if len(placement.shape) == 3:
            experts = values.view(-1, *placement.shape[1:])
            matrices = [(piece.begin + number, expert.t()) for number, expert in enumerate(experts)]
        else:
            rows = slice(placement.first_column + piece.begin, placement.first_column + piece.end)
            place = rows if placement.expert is None else (placement.expert, rows)
            matrices = [(place, values.view(-1, placement.shape[1]))]
        for place, matrix in matrices:
            try:
                made = quantise(matrix, quantization.method, quantization.group)
            except ValueError as error:
                raise ModelError(
                    f"the tensor {piece.name} in {self._plan.entries[piece.name].shard} cannot be quantised: {error}"
                ) from error
            for part, tensor in made.tensors.items():
                parts[part][place] = tensor


def _pieces_of(plan: LoadPlan, name: str) -> Iterator[_Piece]:
    """One tensor's pieces: rows that are together no larger than a piece should be, unless one row is."""
    entry, placement = plan.entries[name], plan.placements[name]
    parted = placement.parameter in plan.quantised or placement.expert is not None
    # What is only copied may be cut anywhere between two values.
    rows = entry.shape[0] if parted else math.prod(entry.shape)
    row_bytes = entry.bytes // max(rows, 1)
    step = max(1, PIECE_BYTES // max(row_bytes, 1))
    for begin in range(0, max(rows, 1), step):
        end = min(begin + step, rows)
        yield _Piece(name, begin, end, row_bytes, end == rows)


def _empty_tensors(
    plan: LoadPlan, name: str, parameter: str, places: WeightPlaces, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """What the tensor `name` of the files is a part of, by its names in the model's state, not filled yet."""
    if parameter in plan.quantised:
        module = plan.model.get_submodule(plan.quantised[parameter])
        assert isinstance(module, Quantized)
        names = {
            f"{plan.quantised[parameter]}.{part}": buffer for part, buffer in module.matrix.tensors.items()
        }
        return {name: places.empty(name, buffer.shape, buffer.dtype) for name, buffer in names.items()}
    like = plan.model.get_submodule(parameter.rpartition(".")[0])
    old = getattr(like, parameter.rpartition(".")[2])
    kept = isinstance(like, Quantized) and parameter.rpartition(".")[2] in STORED_PARTS
    chosen = old.dtype if kept else dtype or SAFETENSORS_DTYPES[plan.entries[name].dtype]
    return {parameter: places.empty(parameter, old.shape, chosen)}


def _dtype_of(entry: TensorEntry) -> torch.dtype:
    return SAFETENSORS_DTYPES.get(entry.dtype) or STORED_DTYPES[entry.dtype]


def _host_memory(size: int, places: WeightPlaces) -> Tensor:
    """Room for a piece, pinned where a GPU copies from it, if the system allows."""
    devices = (places.first, *places.layers, places.last)
    if any(device.type == "cuda" for device in devices):
        with suppress(MemoryLimitError):  # then copies are slower, and wait for each other
            return pinned_tensor((size,), torch.uint8)
    return torch.empty(size, dtype=torch.uint8)


def _read(shard: Path, offset: int, memory: Tensor, copied: torch.cuda.Event | None) -> None:
    """Fill `memory` from `offset` on, once what copied from it has been done; OSError for a file that ends before."""
    if copied is not None:
        copied.synchronize()
    view, done = memory.numpy().data, 0
    with shard.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise OSError(f"it ends at {offset + done} bytes")
            done += count


def _unreadable(shard: Path, error: Exception) -> ModelError:
    return ModelError(f"{shard} cannot be read ({one_line(error)}): download it again")
