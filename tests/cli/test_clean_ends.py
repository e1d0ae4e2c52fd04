"""Whatever ends a command, it ends with one line or none, the right code, and no half a file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_moe import cli
from adaptive_moe.cli import output
from tests.cli.running import ROOT, SHAPE, environment, run


def ends(monkeypatch, capsys, error, code):
    """The line on standard error that a command ends with when it meets the error."""

    def command(args):
        raise error

    monkeypatch.setattr("adaptive_moe.cli.tables.run_list", command)
    assert cli.main(["list"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_errors_are_one_line_with_the_command_and_the_file(monkeypatch, capsys):
    full = OSError(28, "No space left on device", "/cache/x.json")
    assert ends(monkeypatch, capsys, full, 1) == (
        "adaptive-moe list: /cache/x.json: No space left on device\n"
    )
    assert ends(monkeypatch, capsys, ValueError("say it"), 2) == "adaptive-moe list: say it\n"
    assert ends(monkeypatch, capsys, RuntimeError("no"), 1) == "adaptive-moe list: no\n"
    assert "interrupted" in ends(monkeypatch, capsys, KeyboardInterrupt(), 130)
    assert ends(monkeypatch, capsys, BrokenPipeError(), 141) == ""


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """As `adaptive-moe doctor | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "adaptive_moe", "list"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
        check=False,
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "adaptive_moe", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(tmp_path),
            check=False,
        )
    text = done.stderr.decode()
    assert text == "adaptive-moe list: the output was not written: No space left on device\n"
    assert done.returncode == 1


@pytest.fixture
def interruptible():
    """A shell starts what runs in its background with SIGINT ignored, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_measuring_is_one_line_and_leaves_nothing(tmp_path):
    cache, table = tmp_path / "cache", tmp_path / "table.json"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "adaptive_moe", "calibrate", *SHAPE),
            *("--max-tokens", "4096", "--budget", "60", "--output", str(table)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cache),
    )
    assert process.stderr is not None
    assert "step 1" in process.stderr.readline()  # it measures
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if " s: step " not in line] == [
        "adaptive-moe calibrate: interrupted, nothing is left behind"
    ]
    assert not table.exists()
    assert not cache.exists() or not list(cache.iterdir())


def test_python_m_and_no_command_say_what_there_is(tmp_path):
    done = run(cache=tmp_path)
    assert done.returncode == 2
    assert "calibrate" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("--version", cache=tmp_path).stdout.startswith("adaptive-moe 0.")


def test_help_and_version_import_little_more_than_the_parser():
    """Cheap to start: counted in modules, since times depend on what else runs."""
    code = (
        "import sys, argparse\n"
        "before = set(sys.modules)\n"
        "from adaptive_moe.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    for word in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", code, word],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        loaded = set(done.stderr.split())
        assert {name for name in loaded if name.startswith("adaptive")} == {
            "adaptive_moe",
            "adaptive_moe.cli",
        }
        assert not loaded & {"typing", "dataclasses", "inspect", "logging", "json", "pathlib"}
        assert len(loaded) < 20


@pytest.mark.parametrize(
    "command",
    list(cli.COMMANDS),
)
def test_help_of_a_command_does_without_torch(command):
    code = (
        "import sys\nfrom adaptive_moe.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert f"usage: adaptive-moe {command}" in done.stdout


def test_every_command_has_json(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "--json" in capsys.readouterr().out, command


def test_a_path_the_terminal_cannot_show_is_shown_escaped(tmp_path):
    cache = tmp_path / "größe"
    for variables in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}):
        done = run("list", cache=cache, **variables)
        assert done.returncode == 0, done.stderr
        assert "nothing is kept in" in done.stdout


def test_no_home_is_no_traceback(tmp_path):
    environ = environment(tmp_path)
    for name in ("HOME", "ADAPTIVE_MOE_CACHE_DIR", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT"):
        environ.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "adaptive_moe", "list"],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    place = tmp_path / "page.html"
    output.write(str(place), b"one")
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(OSError, match=r"No space left on device: .*page\.html"):
        output.write(str(place), b"two")
    assert place.read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def _no_space(descriptor):
    raise OSError(28, "No space left on device")


def test_writing_follows_a_link_and_fills_a_device(tmp_path):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(target)
    output.write(str(link), b"1")
    assert link.is_symlink()
    assert target.read_bytes() == b"1"
    output.write(os.devnull, b"1")
    assert not Path(os.devnull).is_file()


def test_checking_a_place_leaves_nothing_there(tmp_path):
    output.check_place(str(tmp_path / "deep" / "file.json"))
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(ValueError, match="give another place"):
        output.check_place(str(tmp_path))
    with pytest.raises(ValueError, match="give another place"):
        output.check_place("/proc/nowhere/x.json")


def test_the_plain_progress_lines_come_seldom(monkeypatch, capsys):
    from adaptive_moe.cli import progress

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.ProgressBar(30.0) as shown:
        for second in range(25):
            now[0] = float(second)
            shown(second, 50, "64 tokens")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "0.0 of 30.0 s: step 0, 64 tokens"
    assert [line.split()[0] for line in lines] == ["0.0", "10.0", "20.0"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_the_shell_closed_is_no_traceback(tmp_path, closed):
    command = f"{sys.executable} -m adaptive_moe list --table nothing {closed}"
    done = subprocess.run(
        f"{command}; echo code $? >{tmp_path}/code",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        env=environment(tmp_path),
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "code").read_text() == "code 2\n"


def test_without_torch_a_command_that_needs_it_is_one_line(tmp_path):
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "torch.py").write_text("raise ModuleNotFoundError('no torch here', name='torch')\n")
    paths = os.pathsep.join([str(absent), str(ROOT)])
    done = run("calibrate", *SHAPE, cache=tmp_path, PYTHONPATH=paths)
    assert done.returncode == 1
    assert done.stderr == "adaptive-moe calibrate: no torch here: pip install torch\n"
    done = run("doctor", cache=tmp_path, PYTHONPATH=paths)
    assert "Traceback" not in done.stderr
    assert run("list", cache=tmp_path, PYTHONPATH=paths).returncode == 0


def test_a_folder_of_a_user_that_does_not_exist_is_no_traceback(tmp_path):
    done = run("list", cache=tmp_path, ADAPTIVE_MOE_CACHE_DIR="~nosuchuser/tables")
    assert done.returncode == 0
    assert done.stdout == "nothing is kept in ~nosuchuser/tables\n"
