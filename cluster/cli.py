"""The `embershard` command: arguments in, exit code and one-line errors out. The work is done elsewhere.

Commands import what they need when they run: `embershard --help` loads neither torch nor Ray.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback

import typer

from .cli_bench import bench
from .cli_chaos import chaos
from .cli_compare import compare
from .cli_data import convert, generate, inspect
from .cli_export import export
from .cli_plan import plan
from .cli_scale import scale, status
from .cli_train import evaluate, train
from .doctor import doctor
from .errors import INTERRUPTED, RUN_THREAD, exit_code, one_line

# click's UsageError, which typer does not export and has moved between versions.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="embershard",
    help="Train recommendation models whose embedding tables are too large for one machine.",
    epilog="Start with: embershard train",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(plan)
app.command()(evaluate)
app.command()(export)
app.command()(compare)
app.command()(convert)
app.command()(generate)
app.command()(inspect)
app.command()(scale)
app.command()(status)
app.command()(chaos)
app.command()(doctor)
app.add_typer(bench, name="bench")


def main() -> None:
    """Runs the command line and exits: 0 success, 1 the run failed, 2 the user's input is wrong, 130 interrupted."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns KeyboardInterrupt into a return value
            _print_error("interrupted")
        if code:
            _exit(int(code))
    except typer.Exit as stop:
        _exit(stop.exit_code)
    except UsageError as error:
        _usage(error)
        _exit(2)
    except BrokenPipeError:  # `embershard inspect ... | head`
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _print_error(one_line(error))
        _exit(exit_code(error))


def _exit(code: int) -> None:
    """Ends the process; everything that must be closed has been closed by now.

    A failed run may leave its thread inside Ray's client, which crashes while the interpreter takes itself apart.
    """
    if any(thread.name == RUN_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _usage(error: Exception) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return
    context = getattr(error, "ctx", None)
    text = getattr(error, "format_message", error.__str__)()
    if "No such option" in text and context and any(p.name == "arguments" for p in context.command.params):
        text += ": settings are given as key=value, such as train.epochs=2."
    _print_error(f"{text} See `{context.command_path if context else 'embershard'} --help`.")


def _print_error(text: str) -> None:
    print(f"embershard: {text}", file=sys.stderr)
