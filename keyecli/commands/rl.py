"""`keye rl`: reinforcement learning of a model, or of an adapter, from rewards for its own answers about local videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from keyecli.training.rl import Reinforced, StepFigures


@with_settings(MODEL_OPTIONS, FRAMES_OPTIONS, OUTPUT_OPTIONS)
def rl(
    data: Data = None,
    eval_data: EvalData = None,
    format: Format = None,
    dataset: Dataset = None,
    media_root: MediaRoot = None,
    strict: Strict = False,
    difficulty: Annotated[
        str | None,
        training_option(
            "Data",
            "--difficulty",
            metavar="LOW:HIGH",
            help="Keep rows whose tries, in a first pass, have a mean reward in this range: 0.1:0.9.",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        training_option(
            "Reward",
            "--reward",
            metavar="NAME[:OPTIONS]",
            help="iou, format, exact, choice, count, timestamp, order, cooccurrence, text, summary, auto (by a row's task), "
            "caption, context, or my_module:fn. Repeatable: iou, format:weight=0.1, format:gate.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        training_option(
            "Reward",
            "--judge",
            metavar="URL",
            help="OpenAI-compatible endpoint, as http://localhost:8000/v1.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, training_option("Reward", "--judge-model", metavar="NAME", help="Its model.")
    ] = None,
    judge_budget: Annotated[
        int,
        training_option("Reward", "--judge-budget", metavar="N", help="Stop the run after so many calls."),
    ] = 10_000,
    out: Out = None,
    train: Annotated[
        str, training_option("Run", "--train", metavar="WHAT", help="lora or full; with router: lora,router.")
    ] = "lora",
    rank: Rank = 16,
    alpha: Alpha = 32,
    targets: Targets = None,
    algorithm: Annotated[
        str,
        training_option("Run", "--algorithm", metavar="NAME", help="gspo, grpo (by token) or reinforce."),
    ] = "gspo",
    clip: Annotated[
        str | None,
        training_option(
            "Run",
            "--clip",
            metavar="LOW:HIGH",
            help="How far ratios count below and above 1. Default: 3e-4:4e-4 for gspo, 0.2:0.28 for grpo.",
        ),
    ] = None,
    prompts: Annotated[
        int, training_option("Run", "--prompts", metavar="N", help="Prompts of a step, over all GPUs.")
    ] = 8,
    rollouts: Annotated[
        int, training_option("Run", "--rollouts", metavar="N", help="Tries of each prompt.")
    ] = 8,
    bucket_scaling: Annotated[
        bool,
        training_option(
            "Run",
            "--bucket-scaling",
            help="Make advantages comparable between easy and hard prompts, and short and long tries.",
        ),
    ] = False,
    minibatches: Annotated[
        int | None,
        training_option(
            "Run", "--minibatches", metavar="N", help="Updates of a step. Default: 4; 1 for reinforce."
        ),
    ] = None,
    max_tokens: Annotated[
        int, training_option("Run", "--max-tokens", metavar="N", help="Longest try, reasoning included.")
    ] = 512,
    partial_tokens: Annotated[
        int | None,
        training_option(
            "Run",
            "--partial-tokens",
            metavar="N",
            help="Tries write so much in a step, and go on in the next one. Default: all at once.",
        ),
    ] = None,
    refills: Annotated[
        int,
        training_option(
            "Run",
            "--refills",
            metavar="N",
            help="Draw prompts so often to make up for groups without variance.",
        ),
    ] = 10,
    think: Annotated[
        bool, training_option("Run", "--think/--no-think", help="Tries reason before they answer.")
    ] = True,
    lr: Annotated[
        float | None,
        training_option(
            "Run", "--lr", metavar="X", help="Learning rate. Default: 1e-5 for lora, 1e-6 for full."
        ),
    ] = None,
    decay: Annotated[
        bool,
        training_option("Run", "--decay", help="Let the learning rate fall to nothing, as a cosine does."),
    ] = False,
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
    watch_steps: Annotated[
        int,
        training_option(
            "Run",
            "--watch-steps",
            metavar="N",
            help="Measure so often how far the model is from its start, and whether engine and trainer agree.",
        ),
    ] = 10,
    tensorboard: TensorBoard = False,
    config: Config = None,
    shard: Shard = None,
    *,
    settings: Settings,
) -> None:
    """Let a model answer questions about local videos again and again, score the tries, and make the better ones likelier.

    Rows are those of keye finetune; the right answer stands in solution, answer or ground_truth. OUT gets the adapter or the
    model, metrics.jsonl, rollouts.html and checkpoints. A run may be stopped at any time and goes on with --resume.
    """  # fmt: skip
    take_config(config)
    if data is None or out is None or not reward:
        raise UsageError(
            "give --data FILE, --reward NAME and -o DIR, as in `keye rl --data rows.jsonl --reward iou -o runs/first`"
        )
    kept, clipping = _pair("--difficulty", difficulty), _pair("--clip", clip)
    sampling_options = ask_options(settings, start=None, end=None, duration=None, subtitles=None)
    with leaving_at_once():
        from keyecli.engine.encoded import frame_cache
        from keyecli.tasks.options import ask_settings
        from keyecli.training.network import trained
        from keyecli.training.rewards import compose
        from keyecli.training.rl import RLSettings, reinforce

    score = compose(reward, judge=_judge(judge, judge_model, judge_budget, out))
    files = model_to_train(settings)
    chosen = RLSettings(
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
        decays=decay,
        algorithm=algorithm,  # type: ignore[arg-type]
        clipping=clipping,
        prompts=prompts,
        rollouts=rollouts,
        minibatches=minibatches or (1 if algorithm == "reinforce" else min(4, prompts)),
        answer_tokens=max_tokens,
        partial_tokens=partial_tokens,
        refills=refills,
        think=think,
        watch_steps=watch_steps,
        difficulty=kept,
        bucket_scaling=bucket_scaling,
        rewards=tuple(reward),
    )
    with console.progress() as on_progress:
        made = reinforce(
            files,
            data,
            out,
            chosen,
            score,
            format=format,
            dataset=dataset,
            media_root=media_root,
            eval_data=eval_data,
            resume=resume,
            overwrite=overwrite,
            frame_cache=frame_cache(settings.cache_size) if settings.cache else None,
            on_estimate=tell_estimate,
            on_start=quieten,
            on_first_pass=lambda done, rows: on_progress("first pass", done, rows),
            on_step=step_teller(on_progress, _words),
        )
    print_made(made, _said(made), settings)


def _pair(option: str, text: str | None) -> tuple[float, float] | None:
    """LOW:HIGH; UsageError for anything else."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise UsageError(f"{option} must be LOW:HIGH, two numbers, not {text}") from None
    return low, high


def _judge(url: str | None, model: str | None, budget: int, out: Path) -> Any:
    """The judge that options name; what it said is kept in the run's folder. None without one."""
    if url is None:
        return None
    if model is None:
        raise UsageError("--judge needs --judge-model NAME, the model that it is to ask")
    from keyecli.training.judge_client import Judge, JudgeSettings

    return Judge(JudgeSettings(url=url, model=model, budget=budget, cache=out / "judge"))


def _words(step: int, figures: StepFigures) -> str:
    """What is told of a step."""
    families = "".join(f", {name} {mean:.3f}" for name, mean in figures.families.items())
    return (
        f"step {step}{_figure(', reward', figures.reward)}{families}, {figures.groups} groups, {figures.dropped} dropped"
        f"{_figure(', length', figures.length)}{_figure(', clipped', figures.clipped)}, "
        f"{figures.generate_s:.1f} s drawing, {figures.train_s:.1f} s learning"
    )


def _figure(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.3g}"


def _said(made: Reinforced) -> str:
    words = (
        f"{made.folder}: {made.train}, {made.steps} steps, {made.tries:,} tries, {made.groups} groups learnt from, "
        f"{made.dropped} dropped"
    )
    if made.reward_first is not None and made.reward_last is not None:
        words += f"; reward {made.reward_first:.3f} → {made.reward_last:.3f}"
    if made.before is not None and made.after is not None:
        before, after = (
            "–" if one.reward is None else f"{one.reward:.3f}" for one in (made.before, made.after)
        )
        words += f"; held out {before} → {after}"
    return words
