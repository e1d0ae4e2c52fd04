"""README and docs print commands that work: README's and the examples run, all others parse."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_moe import cli
from tests import sample

ROOT = Path(__file__).parents[1]
PAPERS = [*sorted(ROOT.glob("[CRS]*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NEXT = "## What to type next"


def code(path):
    """Lines of commands: indented or fenced, continued lines joined, and what is in backticks."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return lines + re.findall(r"`([^`\n]+)`", text)


def commands(path):
    """Command lines of ours, without their comments; `...` and FILE are for a reader to fill in."""
    for line in code(path):
        found = re.match(r"(?:[A-Z_]+=\S+ )*adaptive-moe ((?!COMMAND).+)", line)
        if found and "..." not in line and "|" not in line:
            yield found[1]


# The changelog also names commands that are gone.
@pytest.mark.parametrize(
    "path", [p for p in PAPERS if p.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_every_command_line_in_the_papers_is_accepted(path, capsys):
    for command in commands(path):
        words = shlex.split(command, comments=True)
        if words[-1].isupper() or words[-1] in cli.COMMANDS:
            continue  # named, not typed
        try:
            assert words[0] in cli.COMMANDS, f"{path.name}: {words[0]} is no command"
            cli.parser_of(words[0]).parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{path.name}: adaptive-moe {command}: {capsys.readouterr().err}")


def test_readme_is_short_and_its_sample_is_what_the_log_says():
    text = sample.README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert sample.shown(text) == sample.sample()


def test_the_python_of_the_api_page_runs():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(program.replace("max_tokens=256", "max_tokens=32").replace("2.0", "0.5"), names)
    assert names["table"].candidate(24) in ("policy 0", "policy 1", "policy 2")


QUESTIONS = (
    "api architecture benchmark-method bench-amd benchmarks engines how-it-works quickstart sorts"
    " store troubleshooting"
)


@pytest.mark.parametrize("name", QUESTIONS.split())
def test_a_page_says_in_its_first_line_what_it_answers(name):
    first = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# .*\?", first)


@pytest.fixture
def shell(tmp_path):
    """Run a line as somebody would who has adaptive-moe on the path; what it printed."""
    ours = tmp_path / "adaptive-moe"
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m adaptive_moe "$@"\n')
    ours.chmod(0o755)
    chosen = ("VLLM_ROCM_AITER_MOE_DISPATCH_POLICY", "ADAPTIVE_MOE_DISPATCH_POLICY")
    environ = {key: value for key, value in os.environ.items() if key not in chosen}
    environ["PATH"] = f"{tmp_path}{os.pathsep}{environ['PATH']}"
    environ |= {"PYTHONPATH": str(ROOT), "ADAPTIVE_MOE_CACHE_DIR": str(tmp_path / "cache")}

    def run(line, **variables):
        done = subprocess.run(
            line,
            shell=True,
            cwd=tmp_path,
            env={**environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return done.stdout

    return run


def test_readmes_own_commands_run_as_printed(shell, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"(?:^    .+\n)+", text.split(NEXT)[1], re.MULTILINE)[0]
    lines = [line.strip() for line in block.splitlines()]
    assert len(lines) > 6
    for line in lines:
        shell(line)
    for name in ("times.svg", "start.html"):
        assert (tmp_path / name).stat().st_size > 1000
    assert (tmp_path / "start.html").read_text(encoding="utf-8").count("<svg") == 1


def test_the_examples_run_on_the_stand_in(shell, tmp_path):
    on_standin = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "aiter_standin"))),
        "OMP_NUM_THREADS": "1",
    }
    text = (ROOT / "examples" / "plain_aiter.py").read_text(encoding="utf-8")
    small = text.replace('"cuda"', '"cpu"').replace("4096, 1024, 4096", "64, 32, 64")
    assert small != text
    (tmp_path / "plain.py").write_text(small, encoding="utf-8")
    said = shell(f"{sys.executable} plain.py", **on_standin)
    assert "WarmUp([8 experts, topk 2, dim 64" in said
    assert "unknown=1" in said  # the forward before warm_up
    script = shlex.quote(str(ROOT / "examples" / "tune_and_ship.sh"))
    said = shell(f"{script} tables {sys.executable} plain.py", **on_standin)
    assert "8 experts, topk 2, dim 64, bfloat16, block 32, up to 64 tokens; aiter" in said
    shell("mkdir elsewhere && tar -xzf tables.tar.gz -C elsewhere")
    copied = tmp_path / "elsewhere" / "tables"
    (name,) = (path.name for path in copied.iterdir())
    again = shell(f"{sys.executable} plain.py", **on_standin, ADAPTIVE_MOE_CACHE_DIR=str(copied))
    # A busy machine leaves counts unsettled, and then the stored table is measured further.
    assert re.search("bfloat16, block 32 (stored|measured)", again)
    assert [path.name for path in copied.iterdir()] == [name]


def test_make_targets_and_files_that_the_papers_name_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in PAPERS:
        for line in code(path):
            if found := re.match(r"make ([a-z-]+)\b", line):
                assert f"\n{found[1]}:" in makefile, line
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} names {target}"
