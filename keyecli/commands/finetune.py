"""`keye finetune`: train a model, or an adapter of it, on local videos."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import FRAMES, MODEL, OUTPUT, ask_options, load_arguments, with_settings
from keyecli.console import ProgressReport, console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.training.distributed import Processes
    from keyecli.training.finetune import Estimate, Finetuned
    from keyecli.training.trainer import Figures

_MODEL = {
    name: MODEL[name]
    for name in ("model", "revision", "offline", "device", "dtype", "kernels", "quant", "cache", "cache_size")
}
_FRAMES = {name: option for name, option in FRAMES.items() if name != "strict"}
_OUTPUT = {name: option for name, option in OUTPUT.items() if name != "config"}


def _option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


@with_settings(_MODEL, _FRAMES, _OUTPUT)
def finetune(
    data: Annotated[
        Path | None, _option("Data", "--data", metavar="FILE", help="Rows to learn; see keye data check.")
    ] = None,
    eval_data: Annotated[
        Path | None,
        _option("Data", "--eval-data", metavar="FILE", help="Rows that are measured, not learnt."),
    ] = None,
    format: Annotated[
        str | None, _option("Data", "--format", metavar="NAME", help="Form of the rows. Default: by columns.")
    ] = None,
    dataset: Annotated[
        str | None, _option("Data", "--dataset", metavar="NAME", help="Its name in a dataset_info.json.")
    ] = None,
    media_root: Annotated[
        Path | None,
        _option("Data", "--media-root", metavar="DIR", help="What relative paths of videos count from."),
    ] = None,
    strict: Annotated[
        bool,
        _option("Data", "--strict", help="Stop at a row that cannot be used, instead of leaving it out."),
    ] = False,
    workers: Annotated[
        int, _option("Data", "--workers", metavar="N", help="Processes that decode the next rows' videos.")
    ] = 0,
    out: Annotated[
        Path | None,
        _option("Run", "--out", "-o", metavar="DIR", help="Folder of the run and of what it makes."),
    ] = None,
    train: Annotated[
        str,
        _option(
            "Run",
            "--train",
            metavar="WHAT",
            help="lora, full, projector, indexer or sparse; with them projector, vision, router: lora,projector.",
        ),
    ] = "lora",
    rank: Annotated[int, _option("Run", "--rank", metavar="N", help="Rank of an adapter.")] = 16,
    alpha: Annotated[
        float, _option("Run", "--alpha", metavar="X", help="An adapter counts alpha / rank.")
    ] = 32,
    dropout: Annotated[
        float, _option("Run", "--dropout", metavar="P", help="Of an adapter's inputs, while training.")
    ] = 0.0,
    targets: Annotated[
        str | None,
        _option("Run", "--targets", metavar="LIST", help="What is adapted. Default: attention,experts."),
    ] = None,
    lr: Annotated[
        float | None,
        _option(
            "Run",
            "--lr",
            metavar="X",
            help="Learning rate. Default: 1e-4 for lora and projector, 1e-3 for indexer, else 1e-5.",
        ),
    ] = None,
    weight_decay: Annotated[float, _option("Run", "--weight-decay", metavar="X", help="Of matrices.")] = 0.0,
    epochs: Annotated[int, _option("Run", "--epochs", metavar="N", help="How often each row is learnt.")] = 1,
    steps: Annotated[
        int | None, _option("Run", "--steps", metavar="N", help="So many updates, in the place of --epochs.")
    ] = None,
    batch_tokens: Annotated[
        int, _option("Run", "--batch-tokens", metavar="N", help="Tokens of an update, over all GPUs.")
    ] = 65_536,
    max_length: Annotated[
        int | None,
        _option(
            "Run",
            "--max-length",
            metavar="N",
            help="Tokens of the longest row; shorter ones are packed up to it. Default: 32768, or the model's context.",
        ),
    ] = None,
    seed: Annotated[int, _option("Run", "--seed", metavar="N", help="Of the order and of new weights.")] = 0,
    optimizer: Annotated[
        str,
        _option(
            "Run", "--optimizer", metavar="NAME", help="adamw, or of bitsandbytes adamw8bit, paged-adamw8bit."
        ),
    ] = "adamw",
    checkpointing: Annotated[
        bool,
        _option(
            "Run",
            "--checkpointing/--no-checkpointing",
            help="Compute layers twice in the place of keeping them.",
        ),
    ] = True,
    deterministic: Annotated[
        bool,
        _option(
            "Run",
            "--deterministic/--no-deterministic",
            help="The same bits every time on a GPU, too, where sums otherwise come in any order; slower.",
        ),
    ] = False,
    resume: Annotated[
        bool, _option("Run", "--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    overwrite: Annotated[bool, _option("Run", "--overwrite", help="Begin anew in a folder in use.")] = False,
    save_steps: Annotated[
        int, _option("Run", "--save-steps", metavar="N", help="A checkpoint every so many updates …")
    ] = 200,
    save_minutes: Annotated[
        float, _option("Run", "--save-minutes", metavar="M", help="… and every so many minutes.")
    ] = 15.0,
    keep: Annotated[int, _option("Run", "--keep", metavar="N", help="How many checkpoints stay.")] = 2,
    eval_steps: Annotated[
        int,
        _option(
            "Run", "--eval-steps", metavar="N", help="Measure --eval-data so often. Default: at the end."
        ),
    ] = 0,
    tensorboard: Annotated[
        bool, _option("Output", "--tensorboard", help="Write events for TensorBoard too.")
    ] = False,
    config: Annotated[
        Path | None,
        _option(
            "Several GPUs",
            "--config",
            metavar="FILE",
            help="accelerate's configuration (.yaml): starts its processes. A .toml file is read in the place of ./keye.toml.",
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        _option(
            "Several GPUs",
            "--shard/--no-shard",
            help="Each process holds a part of every layer (FSDP2). Default: as accelerate says, else whole models.",
        ),
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Train on local videos: an adapter (lora), everything (full), or the sparse attention's indexer (indexer, then sparse).

    Rows are those of ms-swift, LLaMA-Factory, TRL, Qwen, TimeLens and keye forge, as they are. A run may be stopped at any
    time, by Ctrl-C too, and goes on with --resume. Several GPUs: --config accelerate.yaml, or torchrun -m keyecli finetune.
    """  # fmt: skip
    if config is not None and config.suffix in (".yaml", ".yml"):
        _launch(config)
    if data is None or out is None:
        raise UsageError("give --data FILE and -o DIR, as in `keye finetune --data rows.jsonl -o runs/first`")
    # A keye.toml was read when the options were.
    if config is not None and config.suffix != ".toml":
        raise UsageError(
            f"--config {config} must be accelerate's configuration (.yaml) or a settings file (.toml)"
        )
    sampling_options = ask_options(settings, start=None, end=None, duration=None, subtitles=None)
    with leaving_at_once():
        from keyecli.engine.encoded import frame_cache
        from keyecli.engine.loaded import open_model
        from keyecli.model.lora import LoraSettings
        from keyecli.tasks.options import ask_settings
        from keyecli.training.finetune import FinetuneSettings
        from keyecli.training.finetune import finetune as run
        from keyecli.training.network import trained

    what = trained(train)
    adapter = LoraSettings(
        rank,
        alpha,
        dropout,
        **({} if targets is None else {"targets": tuple(targets.split(","))}),  # type: ignore[arg-type]
    )
    arguments = load_arguments(settings)
    files = open_model(
        arguments["model"],
        **{name: arguments[name] for name in ("device", "dtype", "kernels", "quant", "revision")},
    )
    context = files.config.max_position_embeddings
    chosen = FinetuneSettings(
        train=what,
        lora=adapter,
        lr=lr,
        weight_decay=weight_decay,
        epochs=epochs,
        steps=steps,
        batch_tokens=batch_tokens,
        max_length=min(context, 32_768) if max_length is None else max_length,
        seed=seed,
        save_steps=save_steps,
        save_minutes=save_minutes,
        keep=keep,
        eval_steps=eval_steps,
        optimizer=optimizer,
        checkpointing=checkpointing,
        deterministic=deterministic,
        shard=shard,
        workers=workers,
        strict=strict,
        tensorboard=tensorboard,
        sampling=ask_settings(files.preprocessor, **sampling_options).sampling,
    )
    with console.progress() as on_progress:
        made = run(
            files,
            data,
            out,
            chosen,
            format=format,
            dataset=dataset,
            media_root=media_root,
            eval_data=eval_data,
            resume=resume,
            overwrite=overwrite,
            frame_cache=frame_cache(settings.cache_size) if settings.cache else None,
            on_estimate=_tell_estimate,
            on_start=_quieten,
            on_step=_stepper(on_progress),
        )
    if int(os.environ.get("RANK", "0")) == 0:
        console.result(json.dumps(made.to_dict()) if settings.json else _said(made))


def _launch(config: Path) -> None:
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


def _quieten(processes: Processes) -> None:
    """Of several processes the first one speaks."""
    if not processes.first:
        console.quiet = True


def _tell_estimate(estimate: Estimate) -> None:
    minutes = estimate.seconds / 60
    duration = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
    console.notice(
        f"{estimate.memory.describe()}; about {estimate.tokens:,} tokens, {duration} on this machine if frames keep up"
    )


def _stepper(on_progress: ProgressReport) -> Any:
    """Tells each step on a terminal as a bar, elsewhere with --verbose as a line."""

    def tell(step: int, share: float, figures: Figures) -> None:
        divergence = "" if figures.divergence is None else f", indexer {figures.divergence:.4f}"
        words = (
            f"step {step}, loss {figures.entropy:.4f}{divergence}, {figures.tokens_per_s:,.0f} tokens/s, "
            f"{figures.peak_bytes / 2**30:.1f} GiB, fullest expert {figures.fullest_expert:.1f}x"
        )
        left_s = figures.seconds * step * (1 - share) / share if share else 0.0
        on_progress(f"{words}, {left_s:.0f} s left" if share else words, share, 1.0)
        console.detail(words)

    return tell


def _said(made: Finetuned) -> str:
    rows = f"{made.rows:,} rows" + (f", {made.left_out} left out" if made.left_out else "")
    words = f"{made.folder}: {made.train}, {made.steps} steps, {rows}, {made.tokens:,} tokens, loss {made.loss:.4f}"
    if made.before is not None and made.after is not None:
        words += (
            f"; held out: loss {made.before.loss:.4f} → {made.after.loss:.4f}, "
            f"exact {made.before.exact:.3f} → {made.after.exact:.3f}"
        )
    return words
