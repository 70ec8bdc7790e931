"""Encoded frames kept on disk, so that a second question about a clip skips decoding and the vision tower.

An entry's name holds everything that its content follows from: the file's own content, which frames of it, how they were
prepared, and what encoded them. D width, V visual tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from keyecli import __version__
from keyecli.engine.framestore import DEFAULT_BYTES, DESCRIPTION, FileState, FrameStore, sha256_of, state_of
from keyecli.engine.plan import DTYPE_BYTES, InputPlan
from keyecli.errors import KeyeWarning

if TYPE_CHECKING:
    from keyecli.engine.loaded import LoadedModel

KEY_VERSION = 1  # another one makes every entry a miss
SHARD_BYTES = 2**24
PENDING_GROUPS = 4  # that wait for the disk
PATIENCE_S = 1.0
"""How long a run that is done waits until its files are read for their hashes; of a huge file it may have needed little."""


def frame_cache(size_gib: float | None = None) -> FrameCache:
    """The user's cache, of at most `size_gib` GiB (None: 10)."""
    return FrameCache(DEFAULT_BYTES if size_gib is None else int(size_gib * 2**30))


class FrameCache(FrameStore):
    """The store as a run uses it. Nothing here fails a run: what cannot be read is a miss, and what cannot be written is told
    once, as a KeyeWarning."""

    def __init__(self, limit_bytes: int = DEFAULT_BYTES, folder: Path | None = None) -> None:
        super().__init__(limit_bytes, folder)
        self._complaint: str | None = None
        self._told = False

    def holds(self, loaded: LoadedModel, item: InputPlan, exact_resize: bool) -> bool:
        """Whether `find` would find something."""
        place = self._place(loaded, item, exact_resize)
        return place is not None and (place / DESCRIPTION).is_file()

    def find(
        self, loaded: LoadedModel, item: InputPlan, exact_resize: bool
    ) -> Iterator[tuple[int, Tensor]] | None:
        """(frames, their embeddings [V, D] on the CPU) group by group, or None when this input has no entry.

        Ends early where the entry is damaged, which removes it and is told as a KeyeWarning, or has just been evicted.
        """
        place = self._place(loaded, item, exact_resize)
        if place is None:
            return None
        try:
            described = json.loads((place / DESCRIPTION).read_bytes())
            shards = [
                (str(shard["file"]), int(shard["frames"]), int(shard["crc32"]))
                for shard in described["shards"]
            ]
            if sum(frames for _, frames, _ in shards) != item.sampling.frames:
                raise ValueError("not all frames are there")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            self._remove_damaged(place, item)
            return None
        with suppress(OSError):
            os.utime(place)  # its last use
        return self._read(place, shards, item, loaded)

    def recorder(self, inputs: Sequence[InputPlan]) -> Recorder:
        """Keeps what the vision tower makes of the inputs of one run; to be made before any of them is read."""
        return Recorder(self, {item.info.path: state_of(item.info.path) for item in inputs})

    def complain(self, message: str) -> None:
        """Keep for `tell` what went wrong first."""
        self._complaint = self._complaint or message

    def tell(self) -> None:
        """A KeyeWarning about what went wrong, once."""
        if self._complaint is not None and not self._told:
            self._told = True
            warnings.warn(self._complaint, KeyeWarning, stacklevel=3)

    def _place(self, loaded: LoadedModel, item: InputPlan, exact_resize: bool) -> Path | None:
        """Where the entry of an input is; None when there is none. The file is read only when one of its size is kept."""
        state = state_of(item.info.path)
        if state is None or item.info.truncated_at_s is not None:
            return None
        how = encoding_key(loaded, item, exact_resize)
        try:
            if not any(self.folder.glob(f"{how}-{state.size}-*")):
                return None
            content = self.content_of(state)
        except OSError:
            return None
        place = None if content is None else self.place_of(how, state.size, content)
        return place if place is not None and place.is_dir() else None

    def _read(
        self, place: Path, shards: list[tuple[str, int, int]], item: InputPlan, loaded: LoadedModel
    ) -> Iterator[tuple[int, Tensor]]:
        for file, frames, crc32 in shards:
            shape = (frames * item.sampling.tokens_per_frame, loaded.config.hidden_size)
            try:
                content = (place / file).read_bytes()
                if zlib.crc32(content) != crc32:
                    raise ValueError("other bytes than were written")
                embeds = load(content)["embeds"]
                if embeds.shape != shape:
                    raise ValueError(f"embeddings of shape {list(embeds.shape)}")
            except FileNotFoundError:
                if place.is_dir():
                    self._remove_damaged(place, item)
                return
            except (OSError, ValueError, KeyError, SafetensorError):
                self._remove_damaged(place, item)
                return
            yield frames, embeds

    def _remove_damaged(self, place: Path, item: InputPlan) -> None:
        with suppress(OSError):
            self.remove(place)
        self.complain(
            f"the encoded frames of {item.info.path.name} are damaged in the cache: they are made again"
        )


class Recorder:
    """Writes what one run encodes, in a thread; others see nothing of it before `keep`, nor ever without it."""

    def __init__(self, cache: FrameCache, states: Mapping[Path, FileState | None]) -> None:
        self._cache = cache
        self._states = states
        self._stop = threading.Event()
        self._writer = ThreadPoolExecutor(1, "keye-frame-cache")
        self._hasher = ThreadPoolExecutor(1, "keye-file-content")
        self._drafts: list[Draft] = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for pool in (self._writer, self._hasher):
            pool.shutdown(cancel_futures=True)
        for draft in self._drafts:
            draft.remove()

    def draft(self, loaded: LoadedModel, item: InputPlan, exact_resize: bool) -> Draft | None:
        """Begin an entry; None for an input that is not kept: no ordinary file, a cut-off one, more than there is room for."""
        state = self._states[item.info.path]
        size = item.sampling.tokens * loaded.config.hidden_size * DTYPE_BYTES[loaded.dtype]
        if state is None or item.info.truncated_at_s is not None or size > self._cache.limit_bytes:
            return None
        how = encoding_key(loaded, item, exact_resize)
        content = self._hasher.submit(self._cache.content_of, state, self._stop)
        draft = Draft(self._cache, self._writer, content, how, state, loaded.name, item)
        self._drafts.append(draft)
        return draft

    def keep(self) -> None:
        """Complete the entries that were not discarded. KeyeWarning, once a cache: what the disk did not take, or was damaged."""
        try:
            deadline_s = time.monotonic() + PATIENCE_S
            for draft in self._drafts:
                draft.keep(deadline_s)
            if self._drafts:
                self._cache.trim()
        except OSError as error:
            self._cache.complain(
                f"encoded frames cannot be kept in {self._cache.folder} ({error.strerror or error}): name another "
                "folder in KEYE_CACHE_DIR, or use --no-cache"
            )
        self._cache.tell()


class Draft:
    """An entry that is being written, under a name that nobody looks for."""

    def __init__(
        self,
        cache: FrameCache,
        writer: ThreadPoolExecutor,
        content: Future[str | None],
        how: str,
        state: FileState,
        model: str,
        item: InputPlan,
    ) -> None:
        self._cache, self._writer, self._content = cache, writer, content
        self._how, self._state, self._model, self._item = how, state, model, item
        self._folder = cache.fresh_folder()
        self._pending: deque[Future[None]] = deque()
        self._groups: list[tuple[int, Tensor]] = []  # of the shard that is being filled
        self._shards: list[dict[str, Any]] = []
        self._wanted = True
        self._error: OSError | None = None

    def add(self, frames: int, embeds: Tensor) -> None:
        """The next frames' embeddings [V, D]; on a GPU they are copied behind the work that makes them, and nobody waits."""
        done = None
        if embeds.is_cuda:
            on_device, embeds = embeds, torch.empty(embeds.shape, dtype=embeds.dtype, pin_memory=True)
            embeds.copy_(on_device, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(on_device.device))
        self._pending.append(self._writer.submit(self._gather, frames, embeds, done))
        while len(self._pending) > PENDING_GROUPS:
            self._pending.popleft().result()

    def discard(self) -> None:
        """This input's frames are not to be kept."""
        self._wanted = False

    def keep(self, deadline_s: float) -> None:
        """Give the entry its name, once everything is written; not where the file's content is unknown at `deadline_s` of the
        monotonic clock. OSError: the disk did not take it."""
        self._writer.submit(self._write_shard).result()
        try:
            content = self._content.result(max(0.0, deadline_s - time.monotonic()))
        except TimeoutError:
            return
        if self._error is not None:
            raise self._error
        if not self._wanted or content is None or state_of(Path(self._state.path)) != self._state:
            return
        described = {
            "clip": self._item.info.path.name,
            "model": self._model,
            "frames": self._item.sampling.frames,
            "tokens": self._item.sampling.tokens,
            "shards": self._shards,
        }
        (self._folder / DESCRIPTION).write_text(json.dumps(described), encoding="utf-8")
        place = self._cache.place_of(self._how, self._state.size, content)
        try:
            self._folder.rename(place)
        except OSError:
            if not place.is_dir():  # where it is one, another process was faster
                raise

    def remove(self) -> None:
        """Nothing is left of what did not become an entry."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _gather(self, frames: int, embeds: Tensor, done: torch.cuda.Event | None) -> None:
        if done is not None:
            done.synchronize()
        self._groups.append((frames, embeds))
        if sum(part.nbytes for _, part in self._groups) >= SHARD_BYTES:
            self._write_shard()

    def _write_shard(self) -> None:
        groups, self._groups = self._groups, []
        if not groups or not self._wanted:
            return
        content = save({"embeds": torch.cat([embeds for _, embeds in groups])})
        file = f"{len(self._shards):05d}.safetensors"
        frames = sum(frames for frames, _ in groups)
        self._shards.append({"file": file, "frames": frames, "crc32": zlib.crc32(content)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / file).write_bytes(content)
        except OSError as error:  # told when the run is over
            self._error, self._wanted = error, False


def encoding_key(loaded: LoadedModel, item: InputPlan, exact_resize: bool) -> str:
    """A hash of everything that an input's embeddings follow from, but for the content of its file."""
    sampling, preprocessor = item.sampling, loaded.preprocessor
    vision = loaded.config.vision_config.to_dict()
    on_gpu = loaded.device.startswith("cuda")
    said = {
        "version": KEY_VERSION,
        "keye": __version__,
        "torch": torch.__version__,
        "weights": loaded.revision,
        "vision": vision,
        "width": loaded.config.hidden_size,
        "dtype": loaded.dtype,
        "kernels": loaded.kernels,
        "device": torch.cuda.get_device_name(loaded.device) if on_gpu else "cpu",
        "mean": preprocessor.mean,
        "std": preprocessor.std,
        "exact_resize": exact_resize,
        "kind": sampling.kind,
        "size": (sampling.height, sampling.width),
        "times_s": [str(time_s) for time_s in sampling.times_s],
    }
    return sha256_of(json.dumps(said, sort_keys=True, default=str).encode())[:32]
