"""The options that the commands share, each written once, and the decorator that gives them to a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from keyecli.commands import COMMANDS
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings, load_settings


def _option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


# What a command names in its own signature: what it is about, this one time.
Videos = Annotated[list[str] | None, typer.Argument(metavar="VIDEO...", help="Videos, animations, images.")]
Start = Annotated[
    str | None, _option("Frames", "--start", metavar="TIME", help="Begin here: seconds or [hh:]mm:ss[.mmm].")
]
End = Annotated[str | None, _option("Frames", "--end", metavar="TIME", help="Stop here.")]
Duration = Annotated[
    str | None,
    _option("Frames", "--duration", metavar="TIME", help="Length from --start, in the place of --end."),
]
Subtitles = Annotated[
    Path | None,
    _option("Frames", "--subtitles", metavar="FILE", help="Subtitles (srt, vtt, ass) for the model to read."),
]
DryRun = Annotated[bool, _option("Output", "--dry-run", help="Print the plan and stop.")]


# What `with_settings` adds: settings, which may also come from the environment and from files. None: not given.
def _flag(panel: str, *names: str, help: str) -> Any:
    return Annotated[bool | None, _option(panel, *names, help=help)]


def _text(panel: str, metavar: str, *names: str, help: str) -> Any:
    return Annotated[str | None, _option(panel, *names, metavar=metavar, help=help)]


def _number(panel: str, metavar: str, name: str, help: str) -> Any:
    # Text here, which `load_settings` reads as it reads the environment: one way of reading, one wording when it is wrong.
    return _text(panel, metavar, name, help=help)


def _whole(panel: str, name: str, help: str) -> Any:
    return _number(panel, "N", name, help)


MODEL = {
    "model": _text(
        "Model",
        "NAME",
        "--model",
        "-m",
        help="Folder, or hub name of a downloaded model. Default: KEYE_MODEL, else the embedded keye-nano.",
    ),
    "revision": _text("Model", "REV", "--revision", help="Branch, tag or commit of a hub name."),
    "adapter": _text(
        "Model", "FOLDER", "--adapter", help="Adapter that training wrote; --model then defaults to its base."
    ),
    "offline": _flag("Model", "--offline", help="Use local files only, as is always done unless asked."),
    "device": _text(
        "Model",
        "DEVICE",
        "--device",
        help="cpu, cuda, cuda:N, or layers over several: cuda:0,1. Default: cuda where it exists.",
    ),
    "dtype": _text("Model", "DTYPE", "--dtype", help="bf16, fp16 or fp32. Default: bf16 on cuda, else fp32."),
    "kernels": _text(
        "Model", "KIND", "--kernels", help="triton, or reference: plain PyTorch. Default: triton on cuda."
    ),
    "quant": _text(
        "Model", "KIND", "--quant", help="Quantise the weights on the way: int4, int8 or fp8. Default: none."
    ),
    "kv": _text(
        "Model",
        "KIND",
        "--kv",
        help="Type of cached keys and values: fp8 halves them. Default: auto, --dtype.",
    ),
    "offload": _text(
        "Model",
        "WHAT",
        "--offload",
        help="experts: keep them in this machine's memory, for a small GPU; slower. Default: none.",
    ),
    "cache": _flag(
        "Model",
        "--cache/--no-cache",
        help="Keep encoded frames on disk for later questions. Default: --cache.",
    ),
    "cache_size": _number(
        "Model", "GIB", "--cache-size", "Keep at most this much of them; see keye cache. Default: 10."
    ),
}

FRAMES = {
    "fps": _number("Frames", "RATE", "--fps", "Frames a second. Default: the model's own, 2."),
    "max_frames": _whole("Frames", "--max-frames", "At most this many frames of each video."),
    "max_tokens_video": _whole("Frames", "--max-tokens-video", "At most this many tokens of all videos."),
    "min_pixels": _whole("Frames", "--min-pixels", "Enlarge frames below this area; 784 pixels are a token."),
    "max_pixels": _whole("Frames", "--max-pixels", "Shrink frames above this area."),
    "adaptive_budget": _flag(
        "Frames", "--adaptive-budget/--no-adaptive-budget", help="Fewer tokens for clips under 17 minutes."
    ),
    "exact_resize": _flag(
        "Frames", "--exact-resize/--no-exact-resize", help="Resize exactly as the model was trained; slower."
    ),
    "strict": _flag(
        "Frames", "--strict/--no-strict", help="Refuse a damaged video instead of using its readable part."
    ),
}

ANSWER = {
    "max_tokens": _whole("Answer", "--max-tokens", "Longest answer, reasoning included. Default: 2048."),
    "temperature": _number(
        "Answer", "T", "--temperature", "0 (default) is the likeliest token; above, draw."
    ),
    "top_k": _whole("Answer", "--top-k", "Draw from so many of the likeliest. Default: 0, all."),
    "top_p": _number("Answer", "P", "--top-p", "Draw from the likeliest that sum up to this. Default: 1."),
    "min_p": _number(
        "Answer", "P", "--min-p", "Draw from those at least so likely as P times the likeliest."
    ),
    "repetition_penalty": _number(
        "Answer", "X", "--repetition-penalty", "Above 1, what was there before is less likely. Default: 1."
    ),
    "seed": _whole("Answer", "--seed", "The same seed draws the same answer. Default: 0."),
    "stop": Annotated[
        list[str] | None,
        _option(
            "Answer", "--stop", metavar="TEXT", help="End before TEXT, in the reasoning too. Repeatable."
        ),
    ],
    "think": _flag("Answer", "--think/--no-think", help="Reason before answering. Default: --think."),
    "show_thinking": _flag(
        "Answer",
        "--show-thinking/--no-show-thinking",
        help="Print the reasoning on stdout, before the answer.",
    ),
}

OUTPUT = {
    "json": _flag("Output", "--json/--no-json", help="Print one JSON object instead of text."),
    "config": Annotated[
        Path | None,
        _option("Output", "--config", metavar="FILE", help="Read this in the place of ./keye.toml."),
    ],
    "quiet": _flag("Output", "--quiet", "-q", help="Only errors on stderr."),
    "verbose": _flag("Output", "--verbose", "-v", help="More on stderr."),
    "progress": _flag("Output", "--progress/--no-progress", help="Draw a progress bar on a terminal."),
    "debug": _flag("Output", "--debug", help="Show the traceback of a failure."),
}

_LOAD_NAMES = tuple(MODEL)
_ASK_NAMES = tuple(name for name in (*FRAMES, *ANSWER) if name != "show_thinking")


def load_arguments(settings: Settings) -> dict[str, Any]:
    """What `keyecli.load` takes of the settings."""
    return {name: getattr(settings, name) for name in _LOAD_NAMES}


def ask_options(
    settings: Settings, *, start: str | None, end: str | None, duration: str | None, subtitles: Path | None
) -> dict[str, Any]:
    """What `Keye.ask` takes as its options; UsageError for times that cannot be understood or leave nothing.

    The times are checked here too, since a wrong flag should be told before anything heavy is imported.
    """
    from keyecli.video.timecode import parse_span

    start_s, end_s = parse_span(start, end, duration)
    options = {name: getattr(settings, name) for name in _ASK_NAMES}
    return {**options, "start": start_s, "end": end_s, "subtitles": subtitles}


def refuse_stdin(videos: list[str]) -> None:
    """UsageError for "-": a video is read at many places, which a pipe does not allow."""
    if "-" in videos:
        raise UsageError("videos are not read from stdin: save it to a file and name that")


def with_settings(*groups: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `groups`; it receives what they come to as its argument `settings`.

    Flags, environment and files are merged by `load_settings` under the function's name; the console is set to them.
    """
    shared = {name: annotation for group in groups for name, annotation in group.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in shared.items()
        ]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            flags = {name: arguments.pop(name) for name in shared}
            command(settings=_settings_of(command.__name__, flags), **arguments)

        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
        return run

    return decorate


def _settings_of(command: str, flags: dict[str, Any]) -> Settings:
    config = flags.pop("config", None)
    settings = load_settings(command, flags, commands=tuple(COMMANDS), config=config)
    console.configure(
        quiet=settings.quiet, verbose=settings.verbose, progress=settings.progress, debug=settings.debug
    )
    return settings
