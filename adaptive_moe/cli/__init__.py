"""adaptive-moe: runs the module of a command, and ends with one line whatever happens.

A command NAME is two functions of one module, `options_of_NAME(parser)` and `run_NAME(args)`,
which returns an exit code. Only the module of the command that was given is imported.
"""

import os
import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

# command -> its module here, and what it does.
COMMANDS = {
    "calibrate": ("calibrate", "measure one model's sort, decide, and keep the result"),
    "list": ("tables", "every table that is kept, one line of facts each"),
    "show": ("tables", "print a table"),
    "explain": ("tables", "say why a token count gets what it gets"),
    "plot": ("tables", "draw time against tokens, .svg or .png"),
    "page": ("tables", "write everything of a start to one HTML page"),
    "doctor": ("doctor", "what is here, and whether what was asked for will happen"),
}

INTERRUPTED = 130  # as a shell reports it: 128 and the signal's number
BROKEN_PIPE = 141


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run one command.

    Returns:
        0 where it did what was asked, 2 for input that is not accepted, 1 for a failure, 130 where
        it was interrupted, 141 where its output has no reader any more.
    """
    _open_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in COMMANDS else ""
    _print_any_path()
    try:
        code = _run(name, words[1:]) if name else _without_command(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _end(name, "interrupted, nothing is left behind", INTERRUPTED)
    except BrokenPipeError:
        return _end(name, "", BROKEN_PIPE)
    except OSError as error:
        return _end(name, _os_problem(error), 2 if isinstance(error, FileNotFoundError) else 1)
    except ImportError as error:
        return _end(name, f"{error}: pip install {error.name or 'it'}", 1)
    except (ValueError, RuntimeError) as error:
        # Every error text of ours is written for the person at the terminal.
        return _end(name, str(error), 2 if isinstance(error, ValueError) else 1)


def parser_of(name: str) -> "argparse.ArgumentParser":
    """The parser of one command."""
    from adaptive_moe.cli.options import Parser

    module, what = COMMANDS[name]
    parser = Parser(prog=f"adaptive-moe {name}", description=f"{name}: {what}.")
    getattr(import_module(f"adaptive_moe.cli.{module}"), f"options_of_{name}")(parser)
    return parser


def _run(name: str, words: "list[str]") -> int:
    import logging

    args = parser_of(name).parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    module = import_module(f"adaptive_moe.cli.{COMMANDS[name][0]}")
    return int(getattr(module, f"run_{name}")(args))


def _without_command(words: "list[str]") -> int:
    if words[:1] == ["--version"]:
        from adaptive_moe import __version__

        print(f"adaptive-moe {__version__}")
        return 0
    if words and words[0] not in ("-h", "--help"):
        known = ", ".join(COMMANDS)
        raise ValueError(f"{words[0]!r} is no command: give one of {known}")
    lines = [
        "usage: adaptive-moe COMMAND ...",
        "",
        "Measures which MoE sorting dispatch policy is fastest for each token count.",
        "",
        *(f"  {name:11}{what}" for name, (_, what) in COMMANDS.items()),
        "",
        "adaptive-moe COMMAND --help says more. Begin with: adaptive-moe doctor",
    ]
    print("\n".join(lines), file=sys.stdout if words else sys.stderr)
    return 0 if words else 2


def _end(name: str, text: str, code: int) -> int:
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


def _open_closed_streams() -> None:
    """Where the shell closed one (`>&-`), Python has None, on which nothing can be printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _print_any_path() -> None:
    """A path that the terminal's encoding cannot show is shown escaped, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", "") == "strict":
            reconfigure(errors="backslashreplace")
