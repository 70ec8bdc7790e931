"""A training run from its data file to an adapter or a model with a card; it may be interrupted anywhere, and resumed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from keyecli.engine.loaded import (
    LoadedModel,
    ModelFiles,
    free_memory_bytes,
    memory_limits,
)
from keyecli.errors import InputError, KeyeWarning
from keyecli.model.companions import load_tokenizer
from keyecli.training.data import DataFile
from keyecli.training.distributed import Processes
from keyecli.training.estimate import TrainingEstimate, device_rate, estimate_seconds, estimate_training
from keyecli.training.feed import PlannedRow, Planner, Position, Step, steps
from keyecli.training.frames import DecodePool, RowFrames
from keyecli.training.metrics import Metrics, read_metrics
from keyecli.training.packing import pack_tokens
from keyecli.training.plot import loss_plot
from keyecli.training.run import METRICS_FILE, PLOT_FILE, Run, RunSettings, opened, stopping
from keyecli.training.samples import answer_rows
from keyecli.training.schedule import Schedule
from keyecli.training.trainer import HELD_OUT_ROWS, Figures, HeldOut, Trainer

OnStep = Callable[[int, float, Figures], None]
"""Told after each step: its number, the share of the run that is done, and its figures."""

SAMPLES = 4
AHEAD_ROWS = 8


@dataclass(frozen=True)
class FinetuneSettings(RunSettings):
    """Everything that decides a run besides its model and data. batch_tokens: rows of a step add up to at least so many."""

    epochs: int = 1
    batch_tokens: int = 65_536

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("epochs", "batch_tokens", *RunSettings.AT_LEAST_ONE)


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
    with opened(
        files,
        data,
        out,
        settings,
        format=format,
        dataset=dataset,
        media_root=media_root,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
        on_start=on_start,
    ) as begun:
        run = _Finetuning(
            begun.files, begun.rows, begun.held_out, out, settings, begun.processes, frame_cache
        )
        return run.go(resume, on_estimate, on_step)


class _Finetuning(Run):
    """One run of fine-tuning: what has been done so far."""

    settings: FinetuneSettings

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
        super().__init__(files, rows, out, settings, processes, frame_cache)
        self.held_out_rows = held_out
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
            metrics = self.metrics(stack, step if resume else None)
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
        settings, network = self.settings, self.load()
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
        epochs = None if settings.steps is not None else settings.epochs
        coming = steps(trainer.planner, settings.seed, settings.batch_tokens, epochs, position)
        with stopping() as stop:
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
                self.save_in_time(trainer, step, stop, self._state(position))
                if settings.eval_steps and step % settings.eval_steps == 0:
                    self._measured(metrics, held_out, step)
        self.save(trainer, step, self._state(position))
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

    def _state(self, position: Position) -> dict[str, Any]:
        return {
            "position": asdict(position),
            "totals": self.totals,
            "loss": self.last_loss,
            "before": None if self.before is None else asdict(self.before),
            "left_out": self.trainer.left_out,
        }

    def _resume(self) -> tuple[int, Position]:
        state = self.resume(self.trainer)
        self.totals, self.last_loss = state["totals"], state["loss"]
        self.before = None if state["before"] is None else HeldOut(**state["before"])
        self.trainer.left_out = state["left_out"]
        return state["step"], Position(**state["position"])

    # What is told.

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
        self.write_weights(self.trainer.network)
        if self.processes.first:
            self._write_card(result, samples)
        self.processes.wait()
        return result

    def _write_card(self, result: Finetuned, samples: Sequence[Mapping[str, Any]]) -> None:
        rows = read_metrics(self.out / METRICS_FILE)
        loss_plot(rows, self.out / PLOT_FILE, f"{self.out.name}: {result.train}")
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
        self.write_run_card(results, samples, result.left_out)
