"""The hook's assumptions about AITER, checked against AITER's real source by parsing it.

    python tests/contract/check_aiter.py PATH                a checkout of ROCm/aiter, or one
                                                             version of aiter/fused_moe.py
    python tests/contract/check_aiter.py PATH --ref v0.1.9   that version of a git repository

--ref may be repeated. Versions before the policy existed must be recognised as such. AITER is
neither imported nor built.
"""

import argparse
import ast
import functools
import subprocess
import sys
from pathlib import Path

from adaptive_moe.engines.seam import CHOOSER, UNSORTED
from adaptive_moe.kernels.aiter import FLAGS, LEADING, REDUCES, SEAM

FILE = "aiter/fused_moe.py"
POLICY_AT = LEADING.index("dispatch_policy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--ref", action="append", default=[])
    options = parser.parse_args()
    failed = False
    for name, text in sources(options.path, options.ref):
        notes, problems = check(text)
        failed |= bool(problems)
        print(f"{name}: {'FAILED' if problems else 'ok'}")
        for line in [*notes, *(f"PROBLEM: {problem}" for problem in problems)]:
            print(f"  {line}")
    return 1 if failed else 0


def sources(path: Path, refs: list[str]) -> list[tuple[str, str]]:
    if refs:
        show = ["git", "-C", str(path), "show"]
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        return [(ref, run([*show, f"{ref}:{FILE}"]).stdout) for ref in refs]
    file = path if path.is_file() else path / FILE
    if not file.is_file():
        sys.exit(f"check_aiter: {file} does not exist: give a checkout of ROCm/aiter")
    return [(str(file), file.read_text(encoding="utf-8"))]


def check(text: str) -> tuple[list[str], list[str]]:
    """What this version is like, and which assumptions it breaks."""
    tree = ast.parse(text)
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    if SEAM not in functions:
        return [], [f"no module-level function {SEAM}"]
    names = [a.arg for a in functions[SEAM].args.args]
    if "dispatch_policy" not in names:
        return ["has no dispatch_policy: install() refuses it"], []
    problems = []
    if tuple(names[: len(LEADING)]) != LEADING:
        problems.append(f"{SEAM} begins with {names[: len(LEADING)]}, not {list(LEADING)}")
    arguments = functions[SEAM].args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        problems.append(f"{SEAM} takes other than plain parameters")
    notes = [f"after the policy: {', '.join(names[len(LEADING) :]) or 'nothing'}"]

    calls = calls_of(tree, SEAM)
    if not calls:
        problems.append(f"nothing in the module calls {SEAM}")
    for function, call in calls:
        given = {name: ast.unparse(a) for name, a in zip(names, call.args, strict=False)}
        given.update({k.arg: ast.unparse(k.value) for k in call.keywords if k.arg})
        policy = given.get("dispatch_policy", "its default")
        options = [f"{n}={given[n]}" for n in names[len(LEADING) :] if n in given]
        notes.append(f"{function} line {call.lineno}: policy {policy} {' '.join(options)}".strip())
        if any(given.get(name) == "True" for name in UNSORTED):
            continue  # no sort by policy: the hook leaves it alone
        if policy != "moe_sorting_dispatch_policy":
            problems.append(f"the call at line {call.lineno} passes policy {policy}")
        if len(call.args) <= POLICY_AT and "dispatch_policy" not in given:
            problems.append(f"the call at line {call.lineno} leaves the policy out")
    problems += shadowing(tree)
    problems += asking(tree, functions)
    flags = [flag for flag in FLAGS if f"{flag} =" in text]
    reduces = [name for name in REDUCES if name in functions]
    notes.append(f"backend flags: {', '.join(flags) or 'none'}")
    notes.append(f"accumulate decided by: {', '.join(reduces) or 'nothing'}")
    if "accumulate" in names and not reduces:
        problems.append(f"takes accumulate, but has none of {', '.join(REDUCES)}")
    return notes, problems


def calls_of(tree: ast.Module, name: str) -> list[tuple[str, ast.Call]]:
    """(enclosing function, call) for each call by that bare name, as a module global is called."""
    return [
        (function.name, node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def shadowing(tree: ast.Module) -> list[str]:
    """Places that would hide the module global from its callers."""
    found = []
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        stored = [
            n.lineno
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id == SEAM
        ]
        if stored or SEAM in [a.arg for a in function.args.args]:
            found.append(f"{function.name} has a local name {SEAM}")
    return found


def asking(tree: ast.Module, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """AITER's chooser of block sizes: asked just before the sort, the token count first."""
    if CHOOSER not in functions:
        return [f"no {CHOOSER}: block sizes of other token counts stay unknown"]
    problems = []
    if functions[CHOOSER].args.args[0].arg != "token":
        problems.append(f"{CHOOSER} does not take the token count first")
    callers = {function for function, _ in calls_of(tree, SEAM)}
    for function in callers:
        lines = [c.lineno for f, c in calls_of(tree, CHOOSER) if f == function]
        sorts = [c.lineno for f, c in calls_of(tree, SEAM) if f == function]
        if not lines or min(lines) > min(sorts):
            problems.append(f"{function} sorts without having asked {CHOOSER}")
    # Not the annotation: older versions have none.
    for function, call in calls_of(tree, CHOOSER):
        if function in callers and not ast.unparse(call.args[0]).startswith("get_padded_M("):
            problems.append(f"{function} asks {CHOOSER} about {ast.unparse(call.args[0])}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
