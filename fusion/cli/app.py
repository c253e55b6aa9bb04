"""The command's frame: registers the sub-commands, and turns every failure into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fusion import __version__
from fusion.cli import checkpoint, coordinator, dag, jobs, plan, submit, token, top, up, worker, workers
from fusion.cli.command import Command
from fusion.cli.hidden_arguments import hide_secrets
from fusion.cli.output import note, out
from fusion.errors import FusionError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


app = typer.Typer(
    name="fusion",
    help="Train one PyTorch model over many machines that are far apart, differ in speed, and come and go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out(f"fusion {__version__}")
        raise typer.Exit


@app.callback()
def _frame(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FUSION_DEBUG", help="Show the traceback of an error; works anywhere.")
    ] = False,
) -> None:
    """Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted, 143 terminated."""


_COMMANDS: dict[str, Callable[..., Any]] = {
    "up": up.up,
    "coordinator": coordinator.coordinator,
    "worker": worker.worker,
    "submit": submit.submit,
    "jobs": jobs.jobs,
    "job": jobs.job,
    "logs": jobs.logs,
    "cancel": jobs.cancel,
    "workers": workers.workers,
    "drain": workers.drain,
    "top": top.top,
    "dag": dag.dag,
    "plan": plan.plan,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Command)(_command)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(token.app, name="token")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        hide_secrets(given)
    # `--debug` is meant for the whole command, so it is taken wherever a person writes it.
    debug = "--debug" in given or os.environ.get("FUSION_DEBUG", "") not in ("", "0", "false")
    given = [argument for argument in given if argument != "--debug"]
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    # SIGTERM ends a command as Ctrl-C does; daemons have handlers of their own.
    if arguments is None:
        signal.signal(signal.SIGTERM, terminate)
    code = _run(given, debug)
    if code == EXIT_INTERRUPTED:
        note("terminated" if terminated else "interrupted")
        code = EXIT_TERMINATED if terminated else code
    sys.exit(code)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        # typer turns Ctrl-C into its exit code by itself
        result: Any = app(args=arguments, prog_name="fusion", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except FusionError as error:
        if debug:
            raise
        note(f"error: {error}")
        return EXIT_FAILED
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        usage = _usage_message(error)
        if usage is not None:
            note(usage)
            return EXIT_USAGE
        if debug:
            raise
        said = " ".join(str(error).split())
        note(f"error: unexpected {type(error).__name__}: {said} (run again with --debug for the traceback)")
        return EXIT_FAILED


def _usage_message(error: Exception) -> str | None:
    """One line for a wrong command line. Typer may carry its own copy of click, so the kind is told by its shape."""
    format_message = getattr(error, "format_message", None)
    if format_message is None or not hasattr(error, "exit_code"):
        return None
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(context.get_help()) if context is not None else str(format_message())
    path = context.command_path if context is not None else "fusion"
    message = " ".join(str(format_message()).split()).rstrip(".")
    return f"error: {message}; see `{path} --help`"
