"""`keye finetune`: train a model, or an adapter of it, on local videos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import ask_options, with_settings
from keyecli.commands.training import (
    FRAMES_OPTIONS,
    MODEL_OPTIONS,
    OUTPUT_OPTIONS,
    Alpha,
    Checkpointing,
    Config,
    Data,
    Dataset,
    Deterministic,
    Dropout,
    EvalData,
    EvalSteps,
    Format,
    Keep,
    MaxLength,
    MediaRoot,
    Optimizer,
    Out,
    Overwrite,
    Rank,
    Resume,
    SaveMinutes,
    SaveSteps,
    Seed,
    Shard,
    Strict,
    Targets,
    TensorBoard,
    WeightDecay,
    longest_pass,
    lora_settings,
    model_to_train,
    print_made,
    quieten,
    step_teller,
    take_config,
    training_option,
)
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.training.finetune import Estimate, Finetuned
    from keyecli.training.trainer import Figures


@with_settings(MODEL_OPTIONS, FRAMES_OPTIONS, OUTPUT_OPTIONS)
def finetune(
    data: Data = None,
    eval_data: EvalData = None,
    format: Format = None,
    dataset: Dataset = None,
    media_root: MediaRoot = None,
    strict: Strict = False,
    workers: Annotated[
        int,
        training_option(
            "Data", "--workers", metavar="N", help="Processes that decode the next rows' videos."
        ),
    ] = 0,
    out: Out = None,
    train: Annotated[
        str,
        training_option(
            "Run",
            "--train",
            metavar="WHAT",
            help="lora, full, projector, indexer or sparse; with them projector, vision, router: lora,projector.",
        ),
    ] = "lora",
    rank: Rank = 16,
    alpha: Alpha = 32,
    dropout: Dropout = 0.0,
    targets: Targets = None,
    lr: Annotated[
        float | None,
        training_option(
            "Run",
            "--lr",
            metavar="X",
            help="Learning rate. Default: 1e-4 for lora and projector, 1e-3 for indexer, else 1e-5.",
        ),
    ] = None,
    weight_decay: WeightDecay = 0.0,
    epochs: Annotated[
        int, training_option("Run", "--epochs", metavar="N", help="How often each row is learnt.")
    ] = 1,
    steps: Annotated[
        int | None,
        training_option("Run", "--steps", metavar="N", help="So many updates, in the place of --epochs."),
    ] = None,
    batch_tokens: Annotated[
        int, training_option("Run", "--batch-tokens", metavar="N", help="Tokens of an update, over all GPUs.")
    ] = 65_536,
    max_length: MaxLength = None,
    seed: Seed = 0,
    optimizer: Optimizer = "adamw",
    checkpointing: Checkpointing = True,
    deterministic: Deterministic = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    save_steps: SaveSteps = 200,
    save_minutes: SaveMinutes = 15.0,
    keep: Keep = 2,
    eval_steps: EvalSteps = 0,
    tensorboard: TensorBoard = False,
    config: Config = None,
    shard: Shard = None,
    *,
    settings: Settings,
) -> None:
    """Train on local videos: an adapter (lora), everything (full), or the sparse attention's indexer (indexer, then sparse).

    Rows are those of ms-swift, LLaMA-Factory, TRL, Qwen, TimeLens and keye forge, as they are. A run may be stopped at any
    time, by Ctrl-C too, and goes on with --resume. Several GPUs: --config accelerate.yaml, or torchrun -m keyecli finetune.
    """  # fmt: skip
    take_config(config)
    if data is None or out is None:
        raise UsageError("give --data FILE and -o DIR, as in `keye finetune --data rows.jsonl -o runs/first`")
    sampling_options = ask_options(settings, start=None, end=None, duration=None, subtitles=None)
    with leaving_at_once():
        from keyecli.engine.encoded import frame_cache
        from keyecli.tasks.options import ask_settings
        from keyecli.training.finetune import FinetuneSettings
        from keyecli.training.finetune import finetune as run
        from keyecli.training.network import trained

    what = trained(train)
    adapter = lora_settings(rank, alpha, dropout, targets)
    files = model_to_train(settings)
    chosen = FinetuneSettings(
        train=what,
        lora=adapter,
        lr=lr,
        weight_decay=weight_decay,
        epochs=epochs,
        steps=steps,
        batch_tokens=batch_tokens,
        max_length=longest_pass(files, max_length),
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
            on_start=quieten,
            on_step=step_teller(on_progress, _words),
        )
    print_made(made, _said(made), settings)


def _tell_estimate(estimate: Estimate) -> None:
    minutes = estimate.seconds / 60
    duration = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
    console.notice(
        f"{estimate.memory.describe()}; about {estimate.tokens:,} tokens, {duration} on this machine if frames keep up"
    )


def _words(step: int, figures: Figures) -> str:
    """What is told of a step."""
    divergence = "" if figures.divergence is None else f", indexer {figures.divergence:.4f}"
    return (
        f"step {step}, loss {figures.entropy:.4f}{divergence}, {figures.tokens_per_s:,.0f} tokens/s, "
        f"{figures.peak_bytes / 2**30:.1f} GiB, fullest expert {figures.fullest_expert:.1f}x"
    )


def _said(made: Finetuned) -> str:
    rows = f"{made.rows:,} rows" + (f", {made.left_out} left out" if made.left_out else "")
    words = f"{made.folder}: {made.train}, {made.steps} steps, {rows}, {made.tokens:,} tokens, loss {made.loss:.4f}"
    if made.before is not None and made.after is not None:
        words += (
            f"; held out: loss {made.before.loss:.4f} → {made.after.loss:.4f}, "
            f"exact {made.before.exact:.3f} → {made.after.exact:.3f}"
        )
    return words
