"""What every training run does: settings, the model that learns, checkpoints and resuming, and what comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from keyecli import __version__
from keyecli.engine.loaded import LoadedModel, ModelFiles, load_weights
from keyecli.errors import ModelError, UsageError
from keyecli.model.adapter import save_adapter
from keyecli.model.checkpoint import save_model
from keyecli.model.companions import copy_companions
from keyecli.model.lora import LoraSettings, add_lora
from keyecli.model.quantize import quantization_in
from keyecli.training import checkpoints
from keyecli.training.card import write_card
from keyecli.training.data import DataFile, open_data
from keyecli.training.distributed import Processes, joined, shard, whole
from keyecli.training.learner import Learner
from keyecli.training.metrics import Metrics
from keyecli.training.network import Main, Network, Trained, freeze, is_trained
from keyecli.training.schedule import LEARNING_RATES
from keyecli.video.sampling import SamplingSettings

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


@dataclass(frozen=True)
class RunSettings:
    """What decides any run besides its model and data. lr None: by what is trained.

    max_length: tokens of the longest pass; save_steps, save_minutes: a checkpoint at least so often, keep: how many stay;
    eval_steps: 0 measures held-out rows at the end alone.
    """

    train: Trained = field(default_factory=lambda: Trained("lora"))
    lora: LoraSettings = field(default_factory=LoraSettings)
    lr: float | None = None
    weight_decay: float = 0.0
    steps: int | None = None
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

    COMMAND: ClassVar[str] = "keye finetune"
    RATES: ClassVar[Mapping[Main, float]] = LEARNING_RATES
    # May differ in a run that is resumed.
    INCIDENTAL: ClassVar[tuple[str, ...]] = (
        "save_steps", "save_minutes", "keep", "eval_steps", "workers", "tensorboard", "shard", "strict"
    )  # fmt: skip
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("max_length", "save_steps", "keep")

    @property
    def rate(self) -> float:
        return self.RATES[self.train.main] if self.lr is None else self.lr

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with."""
        values = {name: value for name, value in asdict(self).items() if name not in self.INCIDENTAL}
        return json.loads(json.dumps({**values, "train": str(self.train), "lr": self.rate}, default=str))

    def __post_init__(self) -> None:
        """UsageError for a value out of range."""
        for name in self.AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps must be at least 1, not {self.steps}")
        if not 0 < self.rate < 1:
            raise UsageError(f"--lr must be above 0 and below 1, not {self.rate}")


@dataclass(frozen=True)
class Opened:
    """What a run begins with: files on this process's device, rows to learn and to measure, and the processes."""

    files: ModelFiles
    rows: DataFile
    held_out: DataFile | None
    processes: Processes


@contextmanager
def opened(
    files: ModelFiles,
    data: Path,
    out: Path,
    settings: RunSettings,
    *,
    format: str | None,
    dataset: str | None,
    media_root: Path | None,
    eval_data: Path | None,
    resume: bool,
    overwrite: bool,
    on_start: Callable[[Processes], None] | None,
) -> Iterator[Opened]:
    """Join the other processes, open the data, claim the folder. UsageError, InputError, ModelError: what cannot be trained."""
    refuse(files, settings)
    with deterministic(settings.deterministic), joined(files.device, settings.shard) as (processes, device):
        if on_start:
            on_start(processes)
        rows = open_data(data, format=format, dataset=dataset, media_root=media_root)
        held_out = None if eval_data is None else open_data(eval_data, format=format, media_root=media_root)
        require_folder(out, resume, overwrite, processes)
        yield Opened(replace(files, device=device), rows, held_out, processes)


class Run:
    """A run: its files and settings, the model once `load` has been called, and when it was last saved."""

    settings: RunSettings
    loaded: LoadedModel

    def __init__(
        self,
        files: ModelFiles,
        rows: DataFile,
        out: Path,
        settings: RunSettings,
        processes: Processes,
        frame_cache: Any,
    ) -> None:
        self.files, self.rows, self.out = files, rows, out
        self.processes, self.frame_cache = processes, frame_cache
        self.settings, self._decisive = settings, settings.decisive()
        self._saved_s, self._saved_step = time.monotonic(), -1

    def load(self) -> Network:
        """The model with what learns; sets `loaded`."""
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
        self.loaded = replace(loaded, frame_cache=None if settings.train.sees else self.frame_cache)
        return network

    # Checkpoints.

    def save_in_time(
        self, learner: Learner, step: int, stop: threading.Event, state: Mapping[str, Any]
    ) -> None:
        """A checkpoint when one is due, or somebody asked to stop: KeyboardInterrupt then."""
        settings = self.settings
        stopped = self.processes.any(stop.is_set(), self.files.device)
        late = self.processes.any(
            time.monotonic() - self._saved_s > 60 * settings.save_minutes, self.files.device
        )
        if stopped or late or step % settings.save_steps == 0:
            self.save(learner, step, state)
        if stopped:
            raise KeyboardInterrupt

    def save(self, learner: Learner, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint of a step that has none yet; state: the run's own, as plain data."""
        if step == self._saved_step:
            return
        common = {
            "settings": self._decisive,
            "data_sha256": self.rows.sha256,
            "weights": self.loaded.revision,
            "random": checkpoints.random_state(self.files.device),
            "keye": __version__,
        }
        checkpoints.save(
            self.out, step, learner.tensors(), {**common, **state}, self.processes, self.settings.keep
        )
        self._saved_s, self._saved_step = time.monotonic(), step

    def resume(self, learner: Learner) -> dict[str, Any]:
        """Go on from the last checkpoint; returns its state. UsageError for a run that differs from the one begun."""
        tensors, state = checkpoints.load(checkpoints.latest(self.out))
        for name, value in self._decisive.items():
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
        learner.take(tensors)
        checkpoints.set_random_state(state["random"], self.files.device)
        self._saved_step = state["step"]
        return state

    def metrics(self, stack: ExitStack, resume_step: int | None) -> Metrics | None:
        """Where figures go; None but in the first process."""
        if not self.processes.first:
            return None
        folder = self.out / "tensorboard" if self.settings.tensorboard else None
        return stack.enter_context(
            Metrics(self.out / METRICS_FILE, resume_step=resume_step, tensorboard=folder)
        )

    # What comes out.

    def write_weights(self, network: Network) -> None:
        """The adapter, or the model; every process has to ask, the first one writes."""
        model, settings, files = self.loaded.model, self.settings, self.files
        learning = {name: whole(parameter.detach()).cpu() for name, parameter in network.learning().items()}
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

    def write_run_card(
        self,
        results: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        left_out: int,
        method: str = "",
    ) -> None:
        """README.md of what the run made; see `write_card`."""
        settings = self.settings
        write_card(
            self.out,
            title=self.out.name,
            base=self.files.name,
            base_revision=self.loaded.revision,
            train=str(settings.train),
            data=[
                {
                    "path": self.rows.path.name,
                    "sha256": self.rows.sha256,
                    "rows": len(self.rows),
                    "skipped": left_out,
                }
            ],
            settings={**self._decisive, "rate": settings.rate},
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
            method=method,
        )


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
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


def _is_factor(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.rpartition(".")[2] in ("gate_up_A", "gate_up_B", "down_A", "down_B", "lora_A", "lora_B")


def _is_extra(name: str, what: Trained) -> bool:
    """Whether a parameter of the base learns beside an adapter."""
    return not _is_factor(name) and ".base_layer." not in name and is_trained(name, what)


def refuse(files: ModelFiles, settings: RunSettings) -> None:
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


def require_folder(out: Path, resume: bool, overwrite: bool, processes: Processes) -> None:
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
def stopping() -> Iterator[threading.Event]:
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
