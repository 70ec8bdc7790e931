"""A training run from its data file to an adapter or a model with a card; it may be interrupted anywhere, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from keyecli import __version__
from keyecli.engine.loaded import (
    LoadedModel,
    ModelFiles,
    free_memory_bytes,
    load_weights,
    memory_limits,
)
from keyecli.errors import InputError, KeyeWarning, ModelError, UsageError
from keyecli.model.adapter import save_adapter
from keyecli.model.checkpoint import save_model
from keyecli.model.companions import copy_companions, load_tokenizer
from keyecli.model.lora import LoraSettings, add_lora
from keyecli.model.quantize import quantization_in
from keyecli.training import checkpoints
from keyecli.training.card import write_card
from keyecli.training.data import DataFile, open_data
from keyecli.training.distributed import Processes, joined, shard, whole
from keyecli.training.estimate import TrainingEstimate, device_rate, estimate_seconds, estimate_training
from keyecli.training.feed import PlannedRow, Planner, Position, Step, steps
from keyecli.training.frames import DecodePool, RowFrames
from keyecli.training.metrics import Metrics, read_metrics
from keyecli.training.network import Network, Trained, freeze, is_trained
from keyecli.training.packing import pack_tokens
from keyecli.training.plot import loss_plot
from keyecli.training.samples import answer_rows
from keyecli.training.schedule import LEARNING_RATES, Schedule
from keyecli.training.trainer import HELD_OUT_ROWS, Figures, HeldOut, Trainer
from keyecli.video.sampling import SamplingSettings

OnStep = Callable[[int, float, Figures], None]
"""Told after each step: its number, the share of the run that is done, and its figures."""

METRICS_FILE = "metrics.jsonl"
SETTINGS_FILE = "finetune.json"
PLOT_FILE = "loss.png"
SAMPLES = 4
AHEAD_ROWS = 8


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that decides a run besides its model and data. None: by what is trained.

    batch_tokens: rows of a step add up to at least so many; max_length: tokens of the longest row, and of a pack; save_steps,
    save_minutes: a checkpoint at least so often, keep: how many stay; eval_steps: 0 measures held-out rows at the end alone.
    """

    train: Trained = field(default_factory=lambda: Trained("lora"))
    lora: LoraSettings = field(default_factory=LoraSettings)
    lr: float | None = None
    weight_decay: float = 0.0
    epochs: int = 1
    steps: int | None = None
    batch_tokens: int = 65_536
    max_length: int = 32_768
    seed: int = 0
    save_steps: int = 200
    save_minutes: float = 15.0
    keep: int = 2
    eval_steps: int = 0
    optimizer: str = "adamw"
    checkpointing: bool = True
    deterministic: bool = False
    shard: bool | None = None
    workers: int = 0
    strict: bool = False
    tensorboard: bool = False
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    @property
    def rate(self) -> float:
        return LEARNING_RATES[self.train.main] if self.lr is None else self.lr

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with."""
        values = asdict(self)
        for name in (
            "save_steps",
            "save_minutes",
            "keep",
            "eval_steps",
            "workers",
            "tensorboard",
            "shard",
            "strict",
        ):
            values.pop(name)
        return json.loads(json.dumps({**values, "train": str(self.train), "lr": self.rate}, default=str))

    def __post_init__(self) -> None:
        """UsageError for a value out of range."""
        for name in ("epochs", "batch_tokens", "max_length", "save_steps", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps must be at least 1, not {self.steps}")
        if not 0 < self.rate < 1:
            raise UsageError(f"--lr must be above 0 and below 1, not {self.rate}")


@dataclass(frozen=True)
class Finetuned:
    """What a run made: `folder` holds an adapter or a model; before and after are the held-out rows' figures."""

    folder: Path
    train: str
    steps: int
    rows: int
    left_out: int
    tokens: int
    learnt_tokens: int
    seconds: float
    loss: float
    peak_bytes: int
    before: HeldOut | None
    after: HeldOut | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, schema keye.finetune/1."""
        return {
            "schema": "keye.finetune/1",
            **asdict(self),
            "folder": str(self.folder),
            "before": None if self.before is None else asdict(self.before),
            "after": None if self.after is None else asdict(self.after),
        }


@dataclass(frozen=True)
class Estimate:
    """What a run will take, before its first step: memory of each device, tokens and seconds of the run; of how many rows that is
    known."""

    memory: TrainingEstimate
    rows: int
    tokens: int
    seconds: float


def finetune(
    files: ModelFiles,
    data: Path,
    out: Path,
    settings: FinetuneSettings,
    *,
    format: str | None = None,
    dataset: str | None = None,
    media_root: Path | None = None,
    eval_data: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    frame_cache: Any = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_start: Callable[[Processes], None] | None = None,
    on_step: OnStep | None = None,
) -> Finetuned:
    """Train and write OUT. UsageError: settings, a folder in use, a run that differs from the one resumed; InputError: data;
    ModelError: a model that cannot be trained so; MemoryLimitError; NotFiniteError: a loss that is not a number.
    KeyboardInterrupt after a checkpoint was saved.
    """
    _refuse(files, settings)
    with _deterministic(settings.deterministic), joined(files.device, settings.shard) as (processes, device):
        if on_start:
            on_start(processes)
        rows = open_data(data, format=format, dataset=dataset, media_root=media_root)
        held_out = None if eval_data is None else open_data(eval_data, format=format, media_root=media_root)
        _require_folder(out, resume, overwrite, processes)
        run = _Run(replace(files, device=device), rows, held_out, out, settings, processes, frame_cache)
        return run.go(resume, on_estimate, on_step)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Have torch and our kernels add up in a fixed order."""
    if not wanted:
        yield
        return
    # cuBLAS reads it when it is first used, and torch refuses to go without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Run:
    """One run: what is loaded, what has been done, and where it is written."""

    def __init__(
        self,
        files: ModelFiles,
        rows: DataFile,
        held_out: DataFile | None,
        out: Path,
        settings: FinetuneSettings,
        processes: Processes,
        frame_cache: Any,
    ) -> None:
        self.files, self.rows, self.held_out_rows, self.out = files, rows, held_out, out
        self.settings, self.processes, self.frame_cache = settings, processes, frame_cache
        self.readers: dict[int, Any] = {}
        self.totals: dict[str, Any] = {"tokens": 0, "learnt_tokens": 0, "rows": 0, "seconds": 0.0, "peak": 0}
        self.last_loss = 0.0
        self.before: HeldOut | None = None
        self.found: tuple[int, HeldOut | None, list[dict[str, Any]]] | None = None

    def go(
        self, resume: bool, on_estimate: Callable[[Estimate], None] | None, on_step: OnStep | None
    ) -> Finetuned:
        settings = self.settings
        planner = Planner(
            self.rows, self.files, load_tokenizer(self.files.folder), settings.sampling, settings.max_length, self._bad
        )  # fmt: skip
        estimate = self._estimate(planner)
        if on_estimate and self.processes.first:
            on_estimate(estimate)
        estimate.memory.check(free_memory_bytes(self.files.device))
        with memory_limits(self.files.device), ExitStack() as stack:
            self._load(planner)
            self.trainer.network.keeper.room_bytes = estimate.memory.room_bytes(
                free_memory_bytes(self.files.device)
            )
            step, position = self._resume() if resume else (0, Position())
            metrics = self._metrics(stack, step if resume else None)
            held_out = self._held_out_rows()
            if step == 0:
                self.before = self.trainer.held_out(held_out)
                self._tell_held_out(metrics, 0, self.before)
            pool = stack.enter_context(
                DecodePool(settings.workers, exact_resize=settings.sampling.exact_resize)
            )
            step, position = self._train(pool, metrics, held_out, step, position, on_step)
            after, samples = self._measured(metrics, held_out, step)
        return self._write(step, after, samples)

    def _bad(self, index: int, error: InputError) -> None:
        # Rows that are looked at for the estimate come again, and are counted then.
        if hasattr(self, "trainer"):
            self.trainer.leave_out(self.rows.source(index), error)

    def _estimate(self, planner: Planner) -> Estimate:
        """From the rows of the first steps, whose lengths stand for all."""
        settings, files = self.settings, self.files
        order = range(min(len(self.rows), 32))
        known = [planned for planned in map(planner.plan, order) if planned is not None]
        if not known and len(self.rows) == len(order):
            raise InputError(
                f"no row of {self.rows.path} can be trained on: `keye data check` says what is wrong with each"
            )
        tokens = [row.example.tokens for row in known] or [settings.max_length]
        whole = min(settings.max_length, max(sum(tokens), max(tokens)))
        longest = pack_tokens(tokens, whole, files.kernels)
        patches = max((row.example.visual_tokens * 4 for row in known), default=None)
        memory = estimate_training(
            files.config,
            train=(settings.train.main, *settings.train.extras),
            dtype=files.dtype,
            lora_rank=settings.lora.rank,
            lora_targets=settings.lora.targets,
            pack_tokens=longest if len(known) == len(self.rows) else settings.max_length,
            device=files.device,
            world=self.processes.count,
            sharded=self.processes.sharded,
            optimizer=settings.optimizer,
            checkpointing=settings.checkpointing,
            patches_per_row=patches,
            accumulates=settings.batch_tokens > settings.max_length * self.processes.count,
        )
        mean = sum(tokens) / len(tokens)
        total = int(mean * len(self.rows)) * settings.epochs
        if settings.steps is not None:
            total = min(total, settings.steps * max(settings.batch_tokens, int(mean)))
        rate = device_rate(files.device, files.dtype) * self.processes.count
        train = (settings.train.main, *settings.train.extras)
        seconds = estimate_seconds(files.config, train, int(mean), rate) * total / mean
        return Estimate(memory, len(known), total, seconds)

    def _load(self, planner: Planner) -> None:
        settings = self.settings
        loaded = load_weights(self.files)
        torch.manual_seed(settings.seed)
        freeze(loaded.model, settings.train)
        if settings.train.main == "lora":
            add_lora(loaded.model, settings.lora)
            for name, parameter in loaded.model.named_parameters():
                if _is_extra(name, settings.train):
                    parameter.requires_grad_(True)
        network = Network(loaded.model, settings.train)
        if settings.checkpointing:
            network.checkpoint_activations()
        if self.processes.sharded:
            shard(network, self.processes, self.files.device)
        self.loaded: LoadedModel = replace(
            loaded, frame_cache=None if settings.train.sees else self.frame_cache
        )
        self.trainer = Trainer(
            self.loaded,
            network,
            planner,
            Schedule(settings.rate, weight_decay=settings.weight_decay),
            self.processes,
            capacity=settings.max_length,
            optimizer=settings.optimizer,
            exact_resize=settings.sampling.exact_resize,
            strict=settings.strict,
            look=self._look,
        )

    def _look(self, row: PlannedRow) -> LoadedModel:
        reader = self.readers.get(id(row))
        return self.loaded if reader is None else replace(self.loaded, read_frames=reader)

    # The order of events.

    def _train(
        self,
        pool: DecodePool,
        metrics: Metrics | None,
        held_out: Sequence[PlannedRow],
        step: int,
        position: Position,
        on_step: OnStep | None,
    ) -> tuple[int, Position]:
        settings, trainer = self.settings, self.trainer
        saved_s, saved_step = time.monotonic(), step
        epochs = None if settings.steps is not None else settings.epochs
        coming = steps(trainer.planner, settings.seed, settings.batch_tokens, epochs, position)
        with _stopping() as stop:
            for planned in self._looked_ahead(pool, coming):
                if settings.steps is not None and step >= settings.steps:
                    break
                share = self._share(step, position)
                figures = trainer.step(planned, share)
                step, position = step + 1, planned.after
                self._count(figures)
                self._tell_step(metrics, step, figures)
                if on_step and self.processes.first:
                    on_step(step, self._share(step, position), figures)
                stopped = self.processes.any(stop.is_set(), self.files.device)
                late = self.processes.any(
                    time.monotonic() - saved_s > 60 * settings.save_minutes, self.files.device
                )
                if stopped or late or step % settings.save_steps == 0:
                    self._save(step, position)
                    saved_s, saved_step = time.monotonic(), step
                if stopped:
                    raise KeyboardInterrupt
                if settings.eval_steps and step % settings.eval_steps == 0:
                    self._measured(metrics, held_out, step)
        if step > saved_step:
            self._save(step, position)
        return step, position

    def _looked_ahead(self, pool: DecodePool, coming: Iterator[Step]) -> Iterator[Step]:
        """Steps whose rows' frames workers decode before they are asked for."""
        if self.settings.workers == 0:
            yield from coming
            return
        frames = RowFrames(pool, self.loaded, exact_resize=self.settings.sampling.exact_resize)
        waiting: list[Step] = []

        def rows() -> Iterator[tuple[PlannedRow, Any]]:
            for planned in coming:
                waiting.append(planned)
                for row in planned.rows:
                    yield row, row.plans

        for row, _, reader in frames.ahead(rows(), AHEAD_ROWS):
            self.readers[id(row)] = reader
            if row is waiting[0].rows[-1]:
                yield waiting.pop(0)
                self.readers.clear()

    def _share(self, step: int, position: Position) -> float:
        settings = self.settings
        if settings.steps is not None:
            return step / settings.steps
        return (position.epoch + position.row / len(self.rows)) / settings.epochs

    def _count(self, figures: Figures) -> None:
        self.totals["tokens"] += figures.tokens
        self.totals["learnt_tokens"] += figures.learnt_tokens
        self.totals["rows"] += figures.rows
        self.totals["seconds"] += figures.seconds
        self.totals["peak"] = max(self.totals["peak"], figures.peak_bytes)
        self.last_loss = figures.loss

    # Checkpoints.

    def _save(self, step: int, position: Position) -> None:
        state = {
            "position": asdict(position),
            "settings": self.settings.decisive(),
            "data_sha256": self.rows.sha256,
            "weights": self.loaded.revision,
            "random": checkpoints.random_state(self.files.device),
            "totals": self.totals,
            "loss": self.last_loss,
            "before": None if self.before is None else asdict(self.before),
            "left_out": self.trainer.left_out,
            "keye": __version__,
        }
        tensors = self.trainer.tensors()
        checkpoints.save(self.out, step, tensors, state, self.processes, self.settings.keep)

    def _resume(self) -> tuple[int, Position]:
        tensors, state = checkpoints.load(checkpoints.latest(self.out))
        for name, value in self.settings.decisive().items():
            if state["settings"].get(name) != value:
                raise UsageError(
                    f"the run in {self.out} has {name.replace('_', '-')} {state['settings'].get(name)} and this one {value}: "
                    "--resume goes on with the same settings"
                )
        if state["data_sha256"] != self.rows.sha256:
            raise UsageError(
                f"{self.rows.path} is not the data that the run in {self.out} began with: --resume needs the same"
            )
        if state["weights"] != self.loaded.revision:
            raise UsageError(
                f"the run in {self.out} began from other weights: --resume needs the same --model"
            )
        self.trainer.take(tensors)
        checkpoints.set_random_state(state["random"], self.files.device)
        self.totals, self.last_loss = state["totals"], state["loss"]
        self.before = None if state["before"] is None else HeldOut(**state["before"])
        self.trainer.left_out = state["left_out"]
        return state["step"], Position(**state["position"])

    # What is told.

    def _metrics(self, stack: ExitStack, resume_step: int | None) -> Metrics | None:
        if not self.processes.first:
            return None
        folder = self.out / "tensorboard" if self.settings.tensorboard else None
        return stack.enter_context(
            Metrics(self.out / METRICS_FILE, resume_step=resume_step, tensorboard=folder)
        )

    def _tell_step(self, metrics: Metrics | None, step: int, figures: Figures) -> None:
        if metrics is not None:
            metrics.write("step", step, **asdict(figures), tokens_per_s=figures.tokens_per_s)

    def _measured(
        self, metrics: Metrics | None, held_out: Sequence[PlannedRow], step: int
    ) -> tuple[HeldOut | None, list[dict[str, Any]]]:
        """Figures of held-out rows and answers to a few, found and told once at a step."""
        if self.found is None or self.found[0] != step:
            figures = self.trainer.held_out(held_out)
            self._tell_held_out(metrics, step, figures)
            self.found = (step, figures, self._samples(metrics, held_out, step))
        return self.found[1], self.found[2]

    def _tell_held_out(self, metrics: Metrics | None, step: int, measured: HeldOut | None) -> None:
        if metrics is not None and measured is not None:
            metrics.write("eval", step, **asdict(measured))

    def _held_out_rows(self) -> list[PlannedRow]:
        if self.held_out_rows is None:
            return []
        planner = self.trainer.planner
        own = Planner(
            self.held_out_rows, planner.files, planner.tokenizer, planner.sampling, planner.max_length,
            lambda index, error: warnings.warn(f"a held-out row is left out: {error}", KeyeWarning, stacklevel=2),
        )  # fmt: skip
        found = [own.plan(index) for index in range(min(len(self.held_out_rows), HELD_OUT_ROWS))]
        return [row for row in found if row is not None]

    def _samples(
        self, metrics: Metrics | None, rows: Sequence[PlannedRow], step: int
    ) -> list[dict[str, Any]]:
        """Answers to a few held-out rows, where a process holds the whole model."""
        if not rows or self.processes.sharded or not self.processes.first:
            self.processes.wait()
            return []
        self.trainer.network.eval()
        samples = answer_rows(self.loaded, rows[:SAMPLES], self.settings.sampling.exact_resize)
        if metrics is not None:
            for sample in samples:
                metrics.write("sample", step, **sample)
        self.processes.wait()
        return samples

    # What comes out.

    def _write(self, step: int, after: HeldOut | None, samples: Sequence[Mapping[str, Any]]) -> Finetuned:
        result = Finetuned(
            folder=self.out,
            train=str(self.settings.train),
            steps=step,
            rows=self.totals["rows"],
            left_out=len(self.trainer.left_out),
            tokens=self.totals["tokens"],
            learnt_tokens=self.totals["learnt_tokens"],
            seconds=self.totals["seconds"],
            loss=self.last_loss,
            peak_bytes=self.totals["peak"],
            before=self.before,
            after=after,
        )
        self._write_weights()
        if self.processes.first:
            self._write_card(result, samples)
        self.processes.wait()
        return result

    def _write_weights(self) -> None:
        model, settings, files = self.loaded.model, self.settings, self.files
        learning = {
            name: whole(parameter.detach()).cpu()
            for name, parameter in self.trainer.network.learning().items()
        }
        if not self.processes.first:
            return
        if settings.train.main == "lora":
            extras = {name: tensor for name, tensor in learning.items() if not _is_factor(name)}
            save_adapter(
                model, self.out, settings=settings.lora, base=files.name, revision=self.loaded.revision,
                tensors=learning, modules_to_save=extras or None,
            )  # fmt: skip
            return
        save_model(model, self.out, tensors=learning, dtype=_stored_dtype(files))
        copy_companions(files.folder, self.out)

    def _write_card(self, result: Finetuned, samples: Sequence[Mapping[str, Any]]) -> None:
        rows = read_metrics(self.out / METRICS_FILE)
        loss_plot(rows, self.out / PLOT_FILE, f"{self.out.name}: {result.train}")
        described = {**self.settings.decisive(), "rate": self.settings.rate}
        first = next((row["loss"] for row in rows if row["kind"] == "step"), None)
        before, after = result.before, result.after
        results = {
            "loss_first": first,
            "loss_last": result.loss,
            "held_out_loss_before": before and before.loss,
            "held_out_loss_after": after and after.loss,
            "held_out_exact_before": before and before.exact,
            "held_out_exact_after": after and after.exact,
            "steps": result.steps,
            "tokens": result.tokens,
            "learnt_tokens": result.learnt_tokens,
            "seconds": result.seconds,
            "tokens_per_s": result.tokens / result.seconds if result.seconds else None,
            "peak_bytes": result.peak_bytes,
        }
        write_card(
            self.out,
            title=self.out.name,
            base=self.files.name,
            base_revision=self.loaded.revision,
            train=result.train,
            data=[
                {
                    "path": self.rows.path.name,
                    "sha256": self.rows.sha256,
                    "rows": len(self.rows),
                    "skipped": result.left_out,
                }
            ],
            settings=described,
            results={name: value for name, value in results.items() if value is not None},
            machine={
                "device": torch.cuda.get_device_name(self.files.device)
                if self.files.device.startswith("cuda")
                else "CPU",
                "processes": self.processes.count,
                "torch": torch.__version__,
                "keyecli": __version__,
            },
            samples=samples,
        )


def _is_factor(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.rpartition(".")[2] in ("gate_up_A", "gate_up_B", "down_A", "down_B", "lora_A", "lora_B")


def _is_extra(name: str, what: Trained) -> bool:
    """Whether a parameter of the base learns beside an adapter."""
    return not _is_factor(name) and ".base_layer." not in name and is_trained(name, what)


def _refuse(files: ModelFiles, settings: FinetuneSettings) -> None:
    """What cannot be trained, before anything is loaded."""
    main = settings.train.main
    if files.parts or files.offload is not None or files.kv is not None:
        raise UsageError(
            "training uses one device a process: leave out --offload and --kv, and name one --device"
        )
    if settings.train.teaches_indexer and files.config.sa_config is None:
        raise ModelError(f"{files.name} has no indexer to train: its attention is dense")
    if quantization_in(files.config, files.folder) is not None and main in ("full", "sparse", "indexer"):
        raise ModelError(
            f"--train {main} changes weights that are quantised: use --train lora, or the unquantised model"
        )
    if "router" in settings.train.extras and not files.config.is_moe:
        raise ModelError(f"{files.name} has no router to train")


def _require_folder(out: Path, resume: bool, overwrite: bool, processes: Processes) -> None:
    """UsageError for a folder that holds something; with `overwrite` a former run's files go."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder for the run")
    taken = out.is_dir() and any(out.iterdir())
    if taken and not resume and not overwrite:
        raise UsageError(
            f"{out} is not empty: give another folder, --resume to go on with its run, or --overwrite"
        )
    if resume:
        checkpoints.latest(out)
    processes.wait()
    if processes.first:
        if taken and overwrite and not resume:
            shutil.rmtree(out / checkpoints.FOLDER, ignore_errors=True)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{out} cannot be written ({error.strerror or error}): choose another place"
            ) from error
    processes.wait()


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Ctrl-C, and being asked to end, set the event, so that a step is finished and saved; a second Ctrl-C ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stored_dtype(files: ModelFiles) -> torch.dtype | None:
    """The type in which the base's files hold its weights, None where they do not say."""
    dtype = files.config.dtype
    return dtype if isinstance(dtype, torch.dtype) or dtype is None else getattr(torch, str(dtype))
