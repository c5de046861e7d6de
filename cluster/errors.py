"""What goes wrong, whose fault it is, and the exit code and the one line that follow."""

from __future__ import annotations

from typing import Literal

ExitCode = Literal[1, 2, 130]
INTERRUPTED: Literal[130] = 130


RUN_THREAD = "run"  # name of the thread that a run's Ray calls happen on


class ConfigError(ValueError):
    """The user's configuration cannot be right: the message names the key, where it was given, and what would work."""


class RunFailed(RuntimeError):
    """The run failed for a reason that is not the user's input.

    user_error: the cause, raised in another process, was the user's input all the same.
    """

    def __init__(self, message: str, *, user_error: bool = False) -> None:
        super().__init__(message)
        self.user_error = user_error


class RunInterrupted(Exception):
    """The user stopped the run; the message says what is left of it and how to go on."""


class Resized(Exception):
    """A worker group came to rest, with a checkpoint, so that one with another number of workers takes its place."""


# Errors of other rooms that speak of the user's input, by name: naming them by class would make `--help` import torch.
_USER_ERRORS = {
    "ConfigError",
    "DataError",
    "TableError",
    "CheckpointError",
    "FeatureError",
    "EmbeddingError",
    "ExportError",
    "SecurityError",
}


def is_user_error(error: BaseException) -> bool:
    """True for errors that the user's files, flags or configuration caused, wherever in embershard they were raised."""
    if isinstance(error, RunFailed):
        return error.user_error
    return _is_named(error, _USER_ERRORS)


def is_final(error: BaseException) -> bool:
    """True for errors that would come again: the user's input, and gradients that are not finite."""
    return is_user_error(error) or _is_named(error, {"GradientError"})


def exit_code(error: BaseException) -> ExitCode:
    """2 the user's input is wrong, 130 interrupted, 1 everything else."""
    if isinstance(error, (RunInterrupted, KeyboardInterrupt)):
        return INTERRUPTED
    return 2 if is_user_error(error) else 1


def one_line(error: BaseException) -> str:
    """The error in one line; an error that is not ours also says its type, which is often half of the news."""
    text = " ".join(str(error).split())
    if _is_ours(error):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """The error that a worker or actor raised, out of the wrappers that Ray puts around it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        error = _inside(error) or error
    return error


def _inside(error: BaseException) -> BaseException | None:
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict) and failures:
        causes = [root_cause(failure) for failure in failures.values()]
        # When one rank fails, its peers fail too, with broken connections: ours says more.
        return next((cause for cause in causes if _is_ours(cause)), causes[0])
    for wrapper in ("controller_failure", "health_check_failure", "_base_exc", "cause"):
        inner = getattr(error, wrapper, None)
        if isinstance(inner, BaseException):
            return inner
    return None


def _is_named(error: BaseException, names: set[str]) -> bool:
    return any(c.__name__ in names and c.__module__.startswith("embershard.") for c in type(error).__mro__)


def _is_ours(error: BaseException) -> bool:
    return any(c.__module__.startswith("embershard.") for c in type(error).__mro__)
