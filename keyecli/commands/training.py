"""What the commands that train have in common: their options, and how they start in several processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.options import FRAMES, MODEL, OUTPUT, load_arguments
from keyecli.console import ProgressReport, console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.engine.loaded import ModelFiles
    from keyecli.model.lora import LoraSettings
    from keyecli.training.distributed import Processes
    from keyecli.training.estimate import TrainingEstimate

LONGEST_PASS = 32_768

MODEL_OPTIONS = {
    name: MODEL[name]
    for name in ("model", "revision", "offline", "device", "dtype", "kernels", "quant", "cache", "cache_size")
}
FRAMES_OPTIONS = {name: option for name, option in FRAMES.items() if name != "strict"}
OUTPUT_OPTIONS = {name: option for name, option in OUTPUT.items() if name != "config"}


def training_option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    """An option of a command that trains."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Data = Annotated[
    Path | None, training_option("Data", "--data", metavar="FILE", help="Rows to learn; see keye data check.")
]
EvalData = Annotated[
    Path | None,
    training_option("Data", "--eval-data", metavar="FILE", help="Rows that are measured, not learnt."),
]
Format = Annotated[
    str | None,
    training_option("Data", "--format", metavar="NAME", help="Form of the rows. Default: by columns."),
]
Dataset = Annotated[
    str | None, training_option("Data", "--dataset", metavar="NAME", help="Its name in a dataset_info.json.")
]
MediaRoot = Annotated[
    Path | None,
    training_option("Data", "--media-root", metavar="DIR", help="What relative paths of videos count from."),
]
Strict = Annotated[
    bool,
    training_option("Data", "--strict", help="Stop at a row that cannot be used, instead of leaving it out."),
]
Out = Annotated[
    Path | None,
    training_option("Run", "--out", "-o", metavar="DIR", help="Folder of the run and of what it makes."),
]
Rank = Annotated[int, training_option("Run", "--rank", metavar="N", help="Rank of an adapter.")]
Alpha = Annotated[
    float, training_option("Run", "--alpha", metavar="X", help="An adapter counts alpha / rank.")
]
Dropout = Annotated[
    float, training_option("Run", "--dropout", metavar="P", help="Of an adapter's inputs, while training.")
]
Targets = Annotated[
    str | None,
    training_option("Run", "--targets", metavar="LIST", help="What is adapted. Default: attention,experts."),
]
WeightDecay = Annotated[float, training_option("Run", "--weight-decay", metavar="X", help="Of matrices.")]
MaxLength = Annotated[
    int | None,
    training_option(
        "Run",
        "--max-length",
        metavar="N",
        help="Tokens of the longest row; shorter ones are packed up to it. Default: 32768, or the model's context.",
    ),
]
Seed = Annotated[int, training_option("Run", "--seed", metavar="N", help="Of the order and of new weights.")]
Optimizer = Annotated[
    str,
    training_option(
        "Run", "--optimizer", metavar="NAME", help="adamw, or of bitsandbytes adamw8bit, paged-adamw8bit."
    ),
]
Checkpointing = Annotated[
    bool,
    training_option(
        "Run",
        "--checkpointing/--no-checkpointing",
        help="Compute layers twice in the place of keeping them.",
    ),
]
Deterministic = Annotated[
    bool,
    training_option(
        "Run",
        "--deterministic/--no-deterministic",
        help="The same bits every time on a GPU, too, where sums otherwise come in any order; slower.",
    ),
]
Resume = Annotated[
    bool, training_option("Run", "--resume", help="Go on with the run in --out from its last checkpoint.")
]
Overwrite = Annotated[bool, training_option("Run", "--overwrite", help="Begin anew in a folder in use.")]
SaveSteps = Annotated[
    int, training_option("Run", "--save-steps", metavar="N", help="A checkpoint every so many updates …")
]
SaveMinutes = Annotated[
    float, training_option("Run", "--save-minutes", metavar="M", help="… and every so many minutes.")
]
Keep = Annotated[int, training_option("Run", "--keep", metavar="N", help="How many checkpoints stay.")]
EvalSteps = Annotated[
    int,
    training_option(
        "Run", "--eval-steps", metavar="N", help="Measure --eval-data so often. Default: at the end."
    ),
]
TensorBoard = Annotated[
    bool, training_option("Output", "--tensorboard", help="Write events for TensorBoard too.")
]
Shard = Annotated[
    bool | None,
    training_option(
        "Several GPUs",
        "--shard/--no-shard",
        help="Each process holds a part of every layer (FSDP2). Default: as accelerate says, else whole models.",
    ),
]
Config = Annotated[
    Path | None,
    training_option(
        "Several GPUs",
        "--config",
        metavar="FILE",
        help="accelerate's configuration (.yaml): starts its processes. A .toml file is read in the place of ./keye.toml.",
    ),
]


def take_config(config: Path | None) -> None:
    """What `--config` means: a launcher's file starts its processes in the place of this one; a keye.toml was read before.

    UsageError for any other file.
    """
    if config is not None and config.suffix in (".yaml", ".yml"):
        launch(config)
    if config is not None and config.suffix != ".toml":
        raise UsageError(
            f"--config {config} must be accelerate's configuration (.yaml) or a settings file (.toml)"
        )


def lora_settings(rank: int, alpha: float, dropout: float, targets: str | None) -> LoraSettings:
    """The adapter that options describe; UsageError for a value out of range."""
    from keyecli.model.lora import LoraSettings

    named: Any = {} if targets is None else {"targets": tuple(targets.split(","))}
    return LoraSettings(rank, alpha, dropout, **named)


def model_to_train(settings: Settings) -> ModelFiles:
    """The model that options name, without its weights; errors as `open_model`."""
    from keyecli.engine.loaded import open_model

    arguments = load_arguments(settings)
    taken = ("device", "dtype", "kernels", "quant", "revision")
    return open_model(arguments["model"], **{name: arguments[name] for name in taken})


def longest_pass(files: ModelFiles, max_length: int | None) -> int:
    """Tokens of the longest pass; by default `LONGEST_PASS`, or the model's context."""
    return min(files.config.max_position_embeddings, LONGEST_PASS) if max_length is None else max_length


def tell_estimate(estimate: TrainingEstimate) -> None:
    """The memory that a run takes."""
    console.notice(estimate.describe())


def step_teller(
    on_progress: ProgressReport, words_of: Callable[[int, Any], str]
) -> Callable[[int, float, Any], None]:
    """Tells each step on a terminal as a bar, elsewhere with --verbose as a line. words_of: of its number and figures."""

    def tell(step: int, share: float, figures: Any) -> None:
        words = words_of(step, figures)
        left_s = figures.seconds * step * (1 - share) / share if share else 0.0
        on_progress(f"{words}, {left_s:.0f} s left" if share else words, share, 1.0)
        console.detail(words)

    return tell


def print_made(made: Any, said: str, settings: Settings) -> None:
    """What a run came to, of several processes by the first one."""
    if int(os.environ.get("RANK", "0")) == 0:
        console.result(json.dumps(made.to_dict()) if settings.json else said)


def launch(config: Path) -> None:
    """Start this command in the processes that accelerate's configuration names, in the place of this one."""
    if not config.is_file():
        raise UsageError(
            f"--config {config} does not exist: accelerate config --config_file {config} writes one"
        )
    arguments = sys.argv[1:]
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith("--config="):
            skip = False
        elif argument == "--config":
            skip = True
        else:
            kept.append(argument)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, "-m", "keyecli", *kept])


def quieten(processes: Processes) -> None:
    """Of several processes the first one speaks."""
    if not processes.first:
        console.quiet = True
