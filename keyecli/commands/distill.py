"""`keye distill`: what several teachers know about local videos, into one student, on the student's own answers."""

from __future__ import annotations

from pathlib import Path
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
    tell_estimate,
    training_option,
)
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.training.distill import Distilled, DistillFigures


@with_settings(MODEL_OPTIONS, FRAMES_OPTIONS, OUTPUT_OPTIONS)
def distill(
    data: Data = None,
    teachers: Annotated[
        Path | None,
        training_option(
            "Data",
            "--teachers",
            metavar="FILE",
            help="Which teacher has which rows (.toml): tables [[teacher]] with adapter or model, tasks, modalities.",
        ),
    ] = None,
    eval_data: EvalData = None,
    format: Format = None,
    dataset: Dataset = None,
    media_root: MediaRoot = None,
    strict: Strict = False,
    reward: Annotated[
        list[str] | None,
        training_option(
            "Data",
            "--reward",
            metavar="NAME[:OPTIONS]",
            help="How answers are scored for whoever watches, as for keye rl. Default: auto, by a row's task.",
        ),
    ] = None,
    out: Out = None,
    train: Annotated[
        str, training_option("Run", "--train", metavar="WHAT", help="lora or full; with router: lora,router.")
    ] = "lora",
    rank: Rank = 16,
    alpha: Alpha = 32,
    targets: Targets = None,
    mode: Annotated[
        str,
        training_option(
            "Run",
            "--mode",
            metavar="NAME",
            help="overlap (likeliest tokens of both), student (of the student's), or teacher-on-student (what was written).",
        ),
    ] = "overlap",
    top_k: Annotated[
        int, training_option("Run", "--top-k", metavar="K", help="Candidates of each token.")
    ] = 64,
    literal: Annotated[
        bool,
        training_option("Run", "--literal", help="The loss as published, whose expected gradient is zero."),
    ] = False,
    weights: Annotated[
        bool,
        training_option(
            "Run",
            "--weights/--no-weights",
            help="Format counts less, numbers and reasoning more than other tokens.",
        ),
    ] = True,
    prompts: Annotated[
        int, training_option("Run", "--prompts", metavar="N", help="Prompts of a step, over all GPUs.")
    ] = 16,
    rollouts: Annotated[
        int, training_option("Run", "--rollouts", metavar="N", help="Answers to each prompt.")
    ] = 1,
    max_tokens: Annotated[
        int, training_option("Run", "--max-tokens", metavar="N", help="Longest answer, reasoning included.")
    ] = 512,
    think: Annotated[
        bool, training_option("Run", "--think/--no-think", help="Answers begin with reasoning.")
    ] = True,
    lr: Annotated[
        float | None,
        training_option(
            "Run", "--lr", metavar="X", help="Learning rate. Default: 1e-4 for lora, 1e-5 for full."
        ),
    ] = None,
    weight_decay: WeightDecay = 0.0,
    steps: Annotated[
        int, training_option("Run", "--steps", metavar="N", help="So many rounds of drawing and learning.")
    ] = 100,
    max_length: MaxLength = None,
    seed: Seed = 0,
    optimizer: Optimizer = "adamw",
    checkpointing: Checkpointing = True,
    deterministic: Deterministic = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    save_steps: SaveSteps = 20,
    save_minutes: SaveMinutes = 15.0,
    keep: Keep = 2,
    eval_steps: EvalSteps = 0,
    tensorboard: TensorBoard = False,
    config: Config = None,
    shard: Shard = None,
    *,
    settings: Settings,
) -> None:
    """Bring what several teachers know into one student: it answers, and the teacher of each row says what it would have written.

    Teachers that are adapters of the student's base share its weights. Rows are those of keye finetune; their answers are not
    looked at. OUT gets the adapter or the model. A run may be stopped at any time and goes on with --resume.
    """  # fmt: skip
    take_config(config)
    if data is None or out is None or teachers is None:
        raise UsageError(
            "give --data FILE, --teachers FILE and -o DIR, as in "
            "`keye distill --data rows.jsonl --teachers routes.toml -o runs/student`"
        )
    sampling_options = ask_options(settings, start=None, end=None, duration=None, subtitles=None)
    with leaving_at_once():
        from keyecli.engine.encoded import frame_cache
        from keyecli.tasks.options import ask_settings
        from keyecli.training.distill import DistillSettings
        from keyecli.training.distill import distill as run
        from keyecli.training.distill_loss import MODES, Estimator
        from keyecli.training.network import trained
        from keyecli.training.rewards import compose
        from keyecli.training.teachers import read_routes

    if mode not in MODES:
        raise UsageError(f"--mode {mode} is not known; use {', '.join(MODES)}")
    routes = read_routes(teachers)
    rewards = tuple(reward or ("auto",))
    files = model_to_train(settings)
    chosen = DistillSettings(
        train=trained(train),
        lora=lora_settings(rank, alpha, 0.0, targets),
        lr=lr,
        weight_decay=weight_decay,
        steps=steps,
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
        strict=strict,
        tensorboard=tensorboard,
        sampling=ask_settings(files.preprocessor, **sampling_options).sampling,
        prompts=prompts,
        rollouts=rollouts,
        answer_tokens=max_tokens,
        think=think,
        rewards=rewards,
        estimator=Estimator(mode=mode, literal=literal, k=top_k),
        weighs=weights,
        routes=tuple(str(route) for route in routes),
    )
    with console.progress() as on_progress:
        made = run(
            files,
            data,
            out,
            chosen,
            routes,
            compose(rewards),
            format=format,
            dataset=dataset,
            media_root=media_root,
            eval_data=eval_data,
            resume=resume,
            overwrite=overwrite,
            frame_cache=frame_cache(settings.cache_size) if settings.cache else None,
            on_estimate=tell_estimate,
            on_start=quieten,
            on_step=step_teller(on_progress, _words),
        )
    print_made(made, _said(made), settings)


def _words(step: int, figures: DistillFigures) -> str:
    """What is told of a step."""
    families = "".join(f", {name} {mean:.3f}" for name, mean in figures.families.items())
    divergence = "" if figures.divergence is None else f", divergence {figures.divergence:.4f}"
    return f"step {step}{divergence}{families}, {figures.generate_s:.1f} s drawing, {figures.train_s:.1f} s learning"


def _said(made: Distilled) -> str:
    words = f"{made.folder}: {made.train}, {made.steps} steps, {made.tries:,} answers"
    if made.divergence_first is not None and made.divergence_last is not None:
        words += f"; divergence {made.divergence_first:.4f} → {made.divergence_last:.4f}"
    if made.before is not None and made.after is not None and made.after.reward is not None:
        before = "–" if made.before.reward is None else f"{made.before.reward:.3f}"
        words += f"; held out {before} → {made.after.reward:.3f}"
    return words
