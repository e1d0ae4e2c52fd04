"""adaptive-moe: finds the module of a command, runs it, and ends cleanly whatever happens.

A command is one module with `add_options(parser)` and `run(args) -> int`. Only the module of the
command that was asked for is imported, so that --help and --version cost an interpreter's start.
"""

import argparse
import os
import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

# command -> its module here, and what it does.
COMMANDS = {
    "calibrate": ("calibrate", "measure one model's sort, decide, and keep the result"),
    "list": ("listing", "everything that is kept, whoever measured it"),
    "show": ("show", "print a calibration's table"),
    "explain": ("explain", "say why a token count gets what it gets"),
    "plot": ("plot", "draw time against tokens, .svg or .png"),
    "page": ("page", "write everything of a start to one HTML page"),
    "status": ("status", "what the servers on this machine run right now"),
    "doctor": ("doctor", "what is here, and whether what was asked for will happen"),
    "cache": ("cache", "remove, export or import what is kept"),
    "bench": ("bench", "judge this machine: measurements of tables, as JSON"),
}

INTERRUPTED = 130  # as a shell reports it: 128 and the signal's number
BROKEN_PIPE = 141


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run one command.

    Returns:
        0 where it did what was asked, 2 for input that is not accepted, 1 for a failure, 130 where
        it was interrupted, 141 where nobody reads its output any more.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in words if word in COMMANDS), None)
    _print_any_path()
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _end(name, "interrupted, nothing is left behind", INTERRUPTED)
    except BrokenPipeError:
        return _end(name, "", BROKEN_PIPE)
    except OSError as error:
        return _end(name, _os_problem(error), 2 if isinstance(error, FileNotFoundError) else 1)
    except ValueError as error:
        # Every error text of ours is written for the person at the terminal.
        return _end(name, str(error), 2)
    except RuntimeError as error:
        return _end(name, str(error), 1)


class Help(argparse.HelpFormatter):
    """As wide as the terminal; argparse would import shutil to find that out."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
        except (OSError, ValueError):
            columns = 80
        super().__init__(prog, width=columns - 2)


class LazyParser(argparse.ArgumentParser):
    """A parser that adds its options when it is asked to parse, and not before."""

    fill: "Callable[[LazyParser], None] | None" = None

    def __init__(self, **options: "Any") -> None:
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str) -> "NoReturn":
        self.exit(2, f"{self.prog}: {message}: `{self.prog} --help` says what is accepted\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self)
        return super().parse_known_args(args, namespace)


def _parser() -> LazyParser:
    parser = LazyParser(
        prog="adaptive-moe",
        description="Measures which MoE sorting dispatch policy is fastest for each token count.",
        epilog="adaptive-moe COMMAND --help says more. Begin with: adaptive-moe doctor",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        command.fill = _filler(module)
    return parser


def _filler(module: str) -> "Callable[[LazyParser], None]":
    def fill(parser: LazyParser) -> None:
        found = import_module(f"adaptive_moe.cli.{module}")
        found.add_options(parser)
        parser.set_defaults(run=found.run)

    return fill


def _run(words: "list[str]") -> int:
    parser = _parser()
    args: Namespace = parser.parse_args(words)
    if args.version:
        from adaptive_moe import __version__

        print(f"adaptive-moe {__version__}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return int(args.run(args))


def _end(name: str | None, text: str, code: int) -> int:
    """One line, and an output that cannot fail again while the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if text:
        print(f"adaptive-moe {name}: {text}" if name else f"adaptive-moe: {text}", file=sys.stderr)
    return code


def _os_problem(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else f"the output was not written: {what}"


def _print_any_path() -> None:
    """A path that the terminal's encoding cannot show is shown escaped, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", "") == "strict":
            reconfigure(errors="backslashreplace")
