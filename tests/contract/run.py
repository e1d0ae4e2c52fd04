"""Contract tests against real engines: build one environment an engine version, and test in it.

    python tests/contract/run.py                         every version below
    python tests/contract/run.py --newest                the newest vLLM and SGLang, and AMD's AITER
    python tests/contract/run.py --engine vllm==0.27.1   one version (may be repeated)

Environments are kept in .contract/ and used again. They hold a CPU build of torch, the engine's
wheel without its dependencies, and of these only what the code under test imports, in the versions
the engine asks for: no GPU package is installed. Where the package index has no CPU build of torch:
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make contract

`amd-aiter` is AMD's own package of AITER (PyPI's `aiter` is something else). Its Python runs as it
is; rocm/ poses as ROCm at its import, compiled/ stands where it would have built kernels.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]

ENGINES = (
    "vllm==0.22.1",
    "vllm==0.23.0",
    "vllm==0.27.1",
    "vllm==0.33.0",
    "sglang==0.5.20",
    "sglang==0.5.22",
    "sglang==0.5.23",
    "amd-aiter==0.1.7.post2.dev18",
)
NEWEST = ("vllm==0.33.0", "sglang==0.5.23", "amd-aiter==0.1.7.post2.dev18")
TORCH = "torch==2.13.0"

# What a distribution's files here are called: vllm.txt and test_vllm.py, and so on.
FILES = {"vllm": "vllm", "sglang": "sglang", "amd-aiter": "aiter"}
# Of the engine's own requirements, those that its modules under test import.
NEEDED = {name: (HERE / f"{file}.txt").read_text().split() for name, file in FILES.items()}


class BuildError(RuntimeError):
    """An environment could not be built; the text says which step and shows its output."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", action="append", help="such as vllm==0.33.0")
    parser.add_argument("--newest", action="store_true", help="only " + " and ".join(NEWEST))
    parser.add_argument("--root", type=Path, default=CHECKOUT / ".contract")
    parser.add_argument("--package", type=Path, default=CHECKOUT, help="the adaptive_moe to test")
    options = parser.parse_args()
    if sys.version_info < (3, 11):
        print("contract: the engines need Python 3.11 or newer; run this with one", file=sys.stderr)
        return 2
    engines = options.engine or (NEWEST if options.newest else ENGINES)
    outcomes = {}
    for engine in engines:
        begun = time.monotonic()
        try:
            python = environment(engine, options.root, options.package.resolve())
            built = time.monotonic()
            passed = run_tests(engine, python)
            outcomes[engine] = "passed" if passed else "FAILED"
        except BuildError as error:
            print(f"contract: {engine}: {error}", file=sys.stderr)
            outcomes[engine], built = "NOT BUILT", time.monotonic()
        took = f"environment {built - begun:.0f} s, tests {time.monotonic() - built:.0f} s"
        outcomes[engine] += f" ({took})"
    for engine, outcome in outcomes.items():
        print(f"contract: {engine}: {outcome}")
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


def environment(engine: str, root: Path, package: Path) -> Path:
    """The Python of the engine's environment, built first where there is none that fits."""
    name, _, version = engine.partition("==")
    if name not in NEEDED or not version:
        accepted = " or ".join(f"{known}==VERSION" for known in NEEDED)
        raise BuildError(f"give {accepted}, not {engine!r}")
    home = root / f"{name}-{version}"
    python = home / "bin" / "python"
    recipe = json.dumps([engine, TORCH, NEEDED[name], sys.version_info[:2]])
    wanted = hashlib.sha256(recipe.encode()).hexdigest()
    ready = home / "ready"
    if not (ready.is_file() and ready.read_text() == wanted):
        print(f"contract: building the environment of {engine} in {home}", flush=True)
        root.mkdir(parents=True, exist_ok=True)
        step("create", [sys.executable, "-m", "venv", "--clear", str(home)])
        install(python, "torch first, so that no other build is pulled in", TORCH)
        install(python, "the engine", "--no-deps", engine)
        # Again with torch named: a dependency must not replace it.
        install(python, "what it imports", TORCH, "pytest", *requirements(python, name))
        ready.write_text(wanted)
    # Each time: the entry points that are tested are those of the package as it is now.
    install(python, "adaptive_moe", "--no-deps", "--force-reinstall", "--editable", str(package))
    return python


def requirements(python: Path, engine: str) -> list[str]:
    """The NEEDED packages, as the installed engine requires them."""
    code = f"import importlib.metadata as m, json; print(json.dumps(m.requires({engine!r})))"
    out = step("read requirements", [str(python), "-c", code])
    asked = {}
    for line in json.loads(out):
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
        if "extra ==" not in marker:
            # Extras, such as fastapi[standard], are not imported here.
            asked.setdefault(name, re.sub(r"\[.*?\]", "", line))
    return [asked.get(name, name) for name in NEEDED[engine]]


def install(python: Path, what: str, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    step(f"install {what}", [*command, "--disable-pip-version-check", *arguments])


def step(what: str, command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise BuildError(
            f"could not {what}: `{' '.join(command)}` ended with {done.returncode}\n{tail}\n"
            "Is the package index reachable, and is there room on the disk? A CPU build of torch "
            "is at https://download.pytorch.org/whl/cpu (PIP_EXTRA_INDEX_URL)."
        )
    return done.stdout


def run_tests(engine: str, python: Path) -> bool:
    name, _, version = engine.partition("==")
    # As in a fresh shell: nothing that a developer has set or stored decides a test.
    ours = ("ADAPTIVE_MOE_", "AITER_", "VLLM_", "SGLANG_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    environ["CONTRACT_VERSION"] = version
    # The engines' modules were installed uncompiled: once is enough for a dozen processes.
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["--durations=5", "--disable-warnings"]  # the engines' own
    test = HERE / f"test_{FILES[name]}.py"
    print(f"contract: testing {engine}", flush=True)
    # From elsewhere, so that what is imported is what is installed.
    command += ["--rootdir", str(HERE), str(test)]
    with tempfile.TemporaryDirectory() as cache:
        environ["XDG_CACHE_HOME"] = cache
        if name == "amd-aiter":
            environ.update(posing_as_rocm(environ, cache))
        done = subprocess.run(command, env=environ, cwd=HERE, check=False)
    return done.returncode == 0


def posing_as_rocm(environ: dict[str, str], folder: str) -> dict[str, str]:
    """What AITER's import wants to find: a ROCm, an MI300X, and modules it would have compiled."""
    rocm = HERE / "rocm"
    return {
        "PATH": os.pathsep.join([str(rocm / "bin"), environ["PATH"]]),
        "ROCM_HOME": str(rocm),
        "GPU_ARCHS": "gfx942",
        # Compiled modules are then imported by their bare names, and built nowhere else.
        "AITER_JIT_DIR": folder,
        "PYTHONPATH": os.pathsep.join([str(HERE / "compiled"), environ["PYTHONPATH"]]),
    }


if __name__ == "__main__":
    sys.exit(main())
