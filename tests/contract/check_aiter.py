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
from types import SimpleNamespace

from adaptive_moe.kernels.aiter import CHOOSER, LEADING, REDUCES, SEAM, UNSORTED

FILE = "aiter/fused_moe.py"
POLICY_AT = LEADING.index("dispatch_policy")
# What has come after the policy so far. Another one may change what a sort is.
LATER = ("return_local_topk_ids", "accumulate", "flat", "output_aux", "output")
# As kernels/call.py reads them.
FLAGS = ("_USE_CK_MOE_SORTING", "_USE_FLYDSL_MOE_SORTING", "_USE_OPUS_MOE_SORTING")
# Which backend runs is an argument of one function, or the other function.
IMPLEMENTATION, FLYDSL = "_moe_sorting_impl", "_flydsl_moe_sorting"


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
    later = names[len(LEADING) :]
    notes = [f"after the policy: {', '.join(later) or 'nothing'}"]
    problems += [
        f"{SEAM} takes {name}, which nobody looked at" for name in later if name not in LATER
    ]

    calls = calls_of(tree, SEAM)
    if not calls:
        problems.append(f"nothing in the module calls {SEAM}")
    for function, call in calls:
        given = {name: ast.unparse(a) for name, a in zip(names, call.args, strict=False)}
        given.update({k.arg: ast.unparse(k.value) for k in call.keywords if k.arg})
        policy = given.get("dispatch_policy", "its default")
        options = [f"{n}={given[n]}" for n in names[len(LEADING) :] if n in given]
        notes.append(f"{function} line {call.lineno}: policy {policy} {' '.join(options)}".strip())
        if any(given.get(name) == "True" for name in UNSORTED) or sorts_for_aux(given):
            continue  # no sort by policy: the hook leaves it alone
        if policy != "moe_sorting_dispatch_policy":
            problems.append(f"the call at line {call.lineno} passes policy {policy}")
        if len(call.args) <= POLICY_AT and "dispatch_policy" not in given:
            problems.append(f"the call at line {call.lineno} leaves the policy out")
    found, wrong = backends(functions)
    notes += [policy_type(functions), *found]
    problems += wrong
    problems += shadowing(tree)
    problems += asking(tree, functions)
    flags = [flag for flag in FLAGS if f"{flag} =" in text]
    reduces = [name for name in REDUCES if name in functions]
    notes.append(f"backend flags: {', '.join(flags) or 'none'}")
    notes.append(f"accumulate decided by: {', '.join(reduces) or 'nothing'}")
    if "accumulate" in names and not reduces:
        problems.append(f"takes accumulate, but has none of {', '.join(REDUCES)}")
    return notes, problems


def sorts_for_aux(given: dict[str, str]) -> bool:
    """Whether a call is the one for output_aux, a bool at first and a constant later."""
    return given.get("output_aux", "False") not in ("False", "None")


def policy_type(functions: dict[str, ast.FunctionDef]) -> str:
    """What of an engine's policy arrives: a custom op converts it to what its schema says."""
    annotations = {
        ast.unparse(argument.annotation)
        for function in functions.values()
        for argument in function.args.args
        if argument.arg == "moe_sorting_dispatch_policy" and argument.annotation is not None
    }
    arrives = "True" if "bool" in annotations else "2"
    return f"a policy of 2 arrives as {arrives}"


def backends(functions: dict[str, ast.FunctionDef]) -> tuple[list[str], list[str]]:
    """What can be called past the backend flags, and how long the buffers are that it returns."""
    notes, problems = [], []
    direct = {IMPLEMENTATION: (*LEADING, "use_opus"), FLYDSL: LEADING[:POLICY_AT]}
    for name, expected in direct.items():
        if name not in functions:
            continue
        given = tuple(argument.arg for argument in functions[name].args.args)
        if given[: len(expected)] != expected:
            problems.append(f"{name} begins with {given[: len(expected)]}, not {expected}")
    notes.append(f"callable directly: {', '.join(n for n in direct if n in functions) or 'none'}")
    for name in (*direct, SEAM):
        length = sorted_length(functions[name]) if name in functions else None
        if length is None:
            continue
        notes.append(f"{name} sorts into {'whole blocks' if length == 544 else 'exact buffers'}")
        if length not in (516, 544):
            problems.append(f"{name} allocates {length} sorted_ids, neither 516 nor 544")
    return notes, problems


def sorted_length(function: ast.FunctionDef) -> int | None:
    """How many sorted_ids it allocates for 2 tokens to 4 of 16 experts in blocks of 32, as its own
    arithmetic says: 516, or 544 in whole blocks. None if it allocates none."""
    names = {
        "topk_ids": SimpleNamespace(numel=lambda: 8, shape=(2, 4), device=None),
        "torch": SimpleNamespace(empty=lambda size, **_: size[0] if type(size) is tuple else size),
        "dtypes": SimpleNamespace(i32=None),
        "device": None,
        "__builtins__": {"int": int, "min": min, "max": max},
    }
    names |= {"M": 2, "topk": 4, "num_experts": 16, "block_size": 32}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value = eval(compile(ast.Expression(node.value), FILE, "eval"), names)
            except (NameError, AttributeError, TypeError):
                continue  # not about lengths
            names[node.targets[0].id] = value
    return names.get("sorted_ids")


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
