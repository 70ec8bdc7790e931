"""The Typer app, its commands imported on use; the one place where a failure becomes a sentence and a code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from keyecli.commands import COMMANDS
from keyecli.console import console, one_line
from keyecli.errors import ExitCode, KeyeError, KeyeWarning, UsageError

HELP_COLUMNS = 100
SPIN_COUNT = "5000"  # turns of a waiting thread before it sleeps; libgomp's own default is 300,000
# The headings of a command's options, in their order.
PANELS = ("Options", "Jobs", "Search", "Model", "Frames", "Answer", "Output")
_BUG = "this is a fault in keye: run again with --debug for the traceback"


class LazyValidation:
    """Validates only what was given: Typer would build a validator for every option, at 0.2 s for a whole command."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if not param.required and "process_value" not in vars(param):
                param.process_value = partial(_process_given, param.process_value)
        return params


class Command(LazyValidation, TyperCommand):
    """A command whose help groups its options under the headings they were declared with."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(_argument_name(param) for param in self.params if _is_argument(param))]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, _with_empty_values(self.params, args))
        except typer.TyperException as error:
            # The parser's own errors do not say whose options they are about.
            if getattr(error, "ctx", None) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        arguments = [param for param in self.params if _is_argument(param)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(
                    [(_argument_name(param), getattr(param, "help", None) or "") for param in arguments]
                )
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
        for param in self.get_params(ctx):
            if not _is_argument(param) and not getattr(param, "hidden", False):
                panel = getattr(param, "rich_help_panel", None) or _default_panel(param)
                row = (_option_names(param), getattr(param, "help", None) or "")
                panels.setdefault(panel, []).append(row)
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows, col_max=32)


class CommandGroup(LazyValidation, TyperGroup):
    """`keye` itself: knows the names of its commands and imports one when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            function = getattr(import_module(f"keyecli.commands.{cmd_name}"), cmd_name)
            app = _new_app()
            app.command(cmd_name, cls=Command)(function)
            self.commands[cmd_name] = typer.main.get_command(app)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0].replace("_", "-")
        if name not in COMMANDS and not ctx.resilient_parsing:
            close = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
            raise UsageError(f"there is no command {args[0]}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def build() -> Any:
    """The whole command line as one click-style command; the commands behind it are imported on use."""
    app = _new_app(add_completion=True)
    app.callback(cls=CommandGroup)(_root)
    return typer.main.get_command(app)


def help_text(command: str = "", columns: int = HELP_COLUMNS) -> str:
    """What `keye COMMAND --help` prints on a terminal of this width; "" is `keye --help`."""
    group = build()
    context = group.make_context("keye", [], resilient_parsing=True, terminal_width=columns)
    if command:
        found = group.get_command(context, command)
        context = found.make_context(command, [], parent=context, resilient_parsing=True)
    return context.get_help()


def run(arguments: list[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code; every failure ends here."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console.configure(debug="--debug" in arguments)
    _show_warnings()
    try:
        code = build().main(args=arguments, prog_name="keye", standalone_mode=False)
        if code == ExitCode.INTERRUPTED:  # Typer turns Ctrl-C into this code
            raise KeyboardInterrupt
        sys.stdout.flush()
        return ExitCode.OK if code is None else int(code)
    except SystemExit as error:  # how Typer leaves after completion, and on a pipe closed by its reader
        return _exit_code(error)
    except BaseException as error:
        return _report(error)


def main() -> NoReturn:
    """The `keye` command."""
    # torch's threads wait for each other by spinning. Where other work wants the same cores that made a small model up to
    # ten times slower; spinning shorter cost nothing on idle ones. The variable is read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    sys.exit(run())


def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Ask local videos questions with Keye-VL-2.0, on this machine.

    Without --model the embedded keye-nano answers: a toy that knows only the synthetic clips of `keye forge`.
    """
    if version:
        from keyecli import __version__

        typer.echo(f"keye {__version__}")
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)


def _new_app(*, add_completion: bool = False) -> typer.Typer:
    return typer.Typer(
        add_completion=add_completion,
        rich_markup_mode=None,  # rich's help panels cost as much time as everything else in `keye --help`
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        context_settings={
            "help_option_names": ["--help", "-h"],
            "max_content_width": HELP_COLUMNS,
            "token_normalize_func": lambda name: name.replace("_", "-"),
        },
    )


def _process_given(process: Callable[[Any, Any], Any], ctx: Any, value: Any) -> Any:
    return None if value is None else process(ctx, value)


def _with_empty_values(params: Sequence[Any], arguments: list[str]) -> list[str]:
    """The arguments, in which an option whose metavar is in brackets has an empty value where it is given without one."""
    optional = [
        param for param in params if not _is_argument(param) and (param.metavar or "").startswith("[")
    ]
    bare = {name for param in optional for name in param.opts}
    following = [*arguments, "-"][1:]
    return [
        f"{argument}=" if argument in bare and after.startswith("-") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _is_argument(param: Any) -> bool:
    return param.param_type_name == "argument"


def _default_panel(param: Any) -> str:
    return "Output" if param.name == "help" else "Options"


def _argument_name(param: Any) -> str:
    return param.metavar or param.name.upper()


def _option_names(param: Any) -> str:
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        names += " / " + ", ".join(param.secondary_opts)
    if getattr(param, "is_flag", False):
        return names
    return f"{names} {param.metavar or param.name.upper()}"


def _show_warnings() -> None:
    """Each KeyeWarning becomes one line on stderr, said once; what libraries warn about is for --verbose."""
    said: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if text in said:
            return
        said.add(text)
        if issubclass(category, KeyeWarning):
            console.warning(text)
        else:
            console.detail(f"{category.__name__}: {text}")

    warnings.showwarning = show
    warnings.simplefilter("always", KeyeWarning)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return ExitCode.OK
    return error.code if isinstance(error.code, int) else ExitCode.FAILURE


def _report(error: BaseException) -> int:
    """Say on stderr what went wrong, in one sentence, and return the exit code it has."""
    if console.debug and not isinstance(error, (typer.TyperException, KeyboardInterrupt)):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyeError):
        console.error(str(error))
        return error.exit_code
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "keye"
        said = error.format_message().rstrip(".")
        console.error(f"{said[:1].lower()}{said[1:]}; see {path} --help")
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        console.error("interrupted")
        return ExitCode.INTERRUPTED
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        _discard_output()
        return ExitCode.FAILURE
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _discard_output()
        console.error("the output cannot be written: no space is left where it goes")
        return ExitCode.FAILURE
    # torch has its own out-of-memory error, which is told by its name: this module does not import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        console.error("not enough memory: sample less with --max-frames or --max-tokens-video")
        return ExitCode.MEMORY
    said = f" ({one_line(str(error))})" if str(error) else ""
    console.error(f"{type(error).__name__}{said}; {_BUG}")
    return ExitCode.FAILURE


def _discard_output() -> None:
    """Nothing more can be written to stdout: let the interpreter's last flush go nowhere instead of complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
