"""The commands on one store: what one writes the others read, whoever measured it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from adaptive_moe import cli
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.shape import SortingShape
from adaptive_moe.store.folder import Folder, stored_files
from adaptive_moe.store.key import Request, key_of
from adaptive_moe.store.text import read_any, report_text, to_text
from tests.cli.running import ROOT, SHAPE, SMALL, run
from tests.store.making import REQUEST, made_table


def deepseek(block_size):
    """A table of DeepSeek-V3's sort with both situations, in which policy 1 wins everywhere."""
    shape = SortingShape(256, 8, 7168, block_size=block_size)
    return made_table(coverage=Coverage.up_to(shape, 64, (1, 2), busy_from=1))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """A cache folder in which `calibrate` has left its result."""
    cache = tmp_path_factory.mktemp("cache")
    done = run("calibrate", *SMALL, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "tunes nothing" in done.stdout
    assert "policy 0 us" in done.stdout
    assert f"written to {cache}" in done.stdout
    # No terminal: plain lines, no control characters.
    assert " of 1.5 s: step 1" in done.stderr
    assert "\x1b" not in done.stderr
    return cache


@pytest.fixture
def engines_cache(tmp_path, monkeypatch):
    """A folder as an engine's warm-up leaves it: two tables."""
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path / "cache"))
    for block_size in (16, 64):
        keep(tmp_path / "cache", deepseek(block_size))
    return tmp_path / "cache"


def keep(folder, table, request=REQUEST):
    """Where it is kept."""
    key = key_of(request, table.evidence)
    assert Folder(folder).replace(key, table)
    return Folder(folder).file(key)


def main(capsys, *words, code=0):
    assert cli.main([*map(str, words)]) == code
    return capsys.readouterr().out


def test_what_calibrate_keeps_is_a_file_of_the_store(calibrated):
    (path,) = stored_files(calibrated)
    (stored,) = read_any(path)
    assert stored.request.engine == "no engine"
    assert f"{stored.key.name}.json" == path.name
    assert [p.name for p in calibrated.iterdir()] == [path.name]


def test_show_says_which_and_its_json_is_the_table(calibrated, monkeypatch, capsys):
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(calibrated))
    (path,) = stored_files(calibrated)
    lines = main(capsys, "show").splitlines()
    assert lines[0] == f"{path}, the newest"
    assert "8 experts, topk 2" in lines[1]
    found = json.loads(main(capsys, "show", "--json"))
    assert found["evidence"]["coverage"]["shape"]["num_experts"] == 8
    assert read_any(path)[0].table.evidence.kernel == "cpu"
    assert found["applied"]["eager"][-1][1] == 32


@pytest.mark.parametrize("which", ["256x8", "gfx942", "vllm-0.33.0", "deepseek-v3"])
def test_tables_are_found_by_part_of_a_name_or_by_model(engines_cache, capsys, which):
    out = main(capsys, "show", "--table", which)
    assert out.splitlines()[0] == f"2 files of {engines_cache}"
    assert out.count("tokens  policy 0 us") == 4  # two tables of two situations


def test_a_stored_file_a_folder_and_a_report_are_all_read(engines_cache, tmp_path, capsys):
    (first, second) = stored_files(engines_cache)
    stored = [one for path in (first, second) for one in read_any(path)]
    copied, report = tmp_path / "copied", tmp_path / "report.json"
    shutil.copytree(engines_cache, copied)
    report.write_text(report_text(to_text(one.request, one.table) for one in stored))
    for path, number in ((first, 1), (copied, 2), (report, 2)):
        assert main(capsys, "list", "--table", path).count("; measured ") == number
        assert main(capsys, "show", "--table", path).count("\ncaptured\n") == number
        assert main(capsys, "explain", "--tokens", 9, "--table", path).count("9 tokens,") == number
        picture = tmp_path / f"{path.stem}.svg"
        main(capsys, "plot", "--output", picture, "--table", path)
        names = (
            [picture] if number == 1 else [picture.with_stem(f"{path.stem}-{n}") for n in (1, 2)]
        )
        assert all(name.stat().st_size > 10_000 for name in names)
        page = tmp_path / f"{path.stem}.html"
        main(capsys, "page", page, "--table", path)
        assert page.read_text().count("<svg") == number


def test_the_page_of_a_start_has_its_tables_and_no_others(engines_cache, tmp_path, capsys):
    path = keep(engines_cache, deepseek(32), Request("sglang 0.5.23"))
    os.utime(path, (1, 1))  # older than vLLM's
    main(capsys, "page", tmp_path / "start.html")
    text = (tmp_path / "start.html").read_text()
    assert text.count("<section") == 2
    assert "vllm 0.33.0" in text
    assert "DeepSeek-V3, block 16, on AMD Instinct MI300X: captured calls, up to 30% off" in text


def test_the_newest_table_has_a_page_under_another_name_too(engines_cache, tmp_path, capsys):
    path = keep(engines_cache, deepseek(32), Request("sglang 0.5.23"))
    renamed = path.rename(path.with_name(path.name.replace("x8-", "x9-")))
    os.utime(renamed, (1 << 31, 1 << 31))
    main(capsys, "page", tmp_path / "start.html")
    assert (tmp_path / "start.html").read_text().count("<section") == 1


def test_explain_says_who_sorts_and_why(engines_cache, capsys):
    name = stored_files(engines_cache)[0].name
    found = json.loads(main(capsys, "explain", "--tokens", "9", "--json", "--table", name))
    assert found["why"][0].startswith(f"9 tokens, eager: {found['candidate']}")
    assert found["captured"] is False
    found = json.loads(main(capsys, "explain", "--tokens", 2, "--graph", "--json", "--table", name))
    assert "2 tokens, captured into a graph" in found["why"][0]
    assert "measured at 2 tokens" in found["why"][1]


def test_plot_says_what_it_wrote_and_writes_pngs_and_standard_output(
    engines_cache, tmp_path, capsysbinary
):
    name, picture = stored_files(engines_cache)[0].name, tmp_path / "times.png"
    assert cli.main(["plot", "--output", str(picture), "--json", "--table", name]) == 0
    assert json.loads(capsysbinary.readouterr().out)["written"] == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert cli.main(["plot", "--output", "-", "--table", name]) == 0
    assert capsysbinary.readouterr().out.startswith(b"<?xml")
    assert cli.main(["plot", "--output", "-", "--table", "256x8"]) == 2


def test_without_matplotlib_plots_end_before_anything_is_measured_and_a_page_has_none(
    engines_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("adaptive_moe.report.plot.find_spec", lambda name: None)
    assert cli.main(["plot", "--output", "x.svg"]) == 2
    assert capsys.readouterr().err.endswith("plots need matplotlib: pip install matplotlib\n")
    assert "without plots: plots need matplotlib" in main(capsys, "page", tmp_path / "start.html")
    assert "<svg" not in (tmp_path / "start.html").read_text()


def test_list_names_what_is_kept_and_what_is_not_usable(engines_cache, capsys):
    bad = engines_cache / "something-0123456789abcdef.json"
    bad.write_text("{}")
    lines = main(capsys, "list").splitlines()
    assert len(lines) == 2 * 4 + 1
    result = "captured calls, up to 30% off the sort at 1 to 2 tokens"
    assert sum(result in line for line in lines) == 2
    assert sum("5 of 5 counts settled in 1 start; measured 2026" in line for line in lines) == 2
    assert sum(line.endswith(", for vllm 0.33.0") for line in lines) == 2
    assert any(bad.name in line and "not usable" in line for line in lines)
    entries = json.loads(main(capsys, "list", "--json"))["entries"]
    assert sorted(entry["usable"] for entry in entries) == [False, True, True]
    (one, _) = (entry for entry in entries if entry["usable"])
    assert one["savings"]["graph"] == {
        "counts": 2,
        "settled": 2,
        "improved": 2,
        "least": 0.3,
        "most": 0.3,
    }


def test_list_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path))
    assert main(capsys, "list") == f"nothing is kept in {tmp_path}\n"
    assert json.loads(main(capsys, "list", "--json"))["entries"] == []


def test_a_renamed_file_is_not_usable(engines_cache, capsys):
    path = stored_files(engines_cache)[0]
    path.rename(path.with_name("else-0123456789abcdef.json"))
    assert f"belongs into {path.name}" in main(capsys, "list")


def test_a_second_calibration_measures_only_what_is_open(tmp_path):
    again = [*SMALL, "--max-tokens", "4", "--json"]
    first = json.loads(run("calibrate", *again, cache=tmp_path).stdout)
    second = json.loads(run("calibrate", *again, cache=tmp_path).stdout)
    starts = [text["evidence"]["starts"] for text in (first, second)]
    assert starts == [1, 2]
    third = json.loads(run("calibrate", *again, "--again", cache=tmp_path).stdout)
    assert third["evidence"]["starts"] == 1
    assert len(stored_files(tmp_path)) == 1


def test_output_is_written_whole_and_may_be_standard_output(tmp_path):
    file = tmp_path / "deep" / "table.json"
    done = run("calibrate", *SMALL, "--output", str(file), cache=tmp_path / "cache")
    assert f"written to {file}" in done.stdout
    assert run("show", "--table", str(file), cache=tmp_path).returncode == 0
    done = run("calibrate", *SMALL, "--output", "-", cache=tmp_path / "cache")
    assert json.loads(done.stdout)["evidence"]["kernel"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["calibrate", "--model", "gpt-9"], "'gpt-9' is not known"),
        (["calibrate", "--experts", "8", "--topk", "9", "--hidden", "64"], "topk=9"),
        (["calibrate", "--experts", "8", "--topk", "2"], "give all three"),
        (["calibrate"], "say which sort is meant"),
        (["calibrate", "--model", "mixtral-8x7b", *SHAPE], "one way"),
        (["calibrate", "--model", "mixtral-8x7b", "--fuse-shared"], "no shared experts"),
        (["calibrate", *SHAPE, "--fuse-shared"], "--fuse-shared needs --model or --config"),
        (["calibrate", *SHAPE, "--block-size", "0"], "block_size=0"),
        (["calibrate", *SHAPE, "--budget", "1e-9"], "too small for one round"),
        (["calibrate", *SHAPE, "--budget", "soon"], "--budget='soon'"),
        (["calibrate", *SHAPE, "--margin", "2"], "--margin='2'"),
        (["calibrate", *SHAPE, "--buckets", "4,2"], "--buckets='4,2'"),
        (["calibrate", *SHAPE, "--capture-sizes", "x"], "--capture-sizes='x'"),
        (["calibrate", *SHAPE, "--max-tokens", "-3"], "--max-tokens=-3"),
        (["calibrate", *SHAPE, "--max-tokens", "0"], "--max-tokens=0"),
        (["calibrate", *SHAPE, "--output", "/proc/nowhere/x.json"], "cannot be written"),
        (["calibrate", "--config", "/nowhere/config.json"], "cannot be read"),
        (["show", "--table", "/nowhere/x.json"], "does not exist"),
        (["show", "--table", "nothing"], "`adaptive-moe list` prints what is kept"),
        (["show", "--table", __file__], "holds no tables"),
        (["plot", "--output", "times.pdf"], "ends in .svg or .png"),
        (["page", "/proc/nowhere/x.html"], "cannot be written"),
        (["explain", "--tokens", "0"], "--tokens=0"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, says, engines_cache, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert len([line for line in said.err.splitlines() if " s: " not in line]) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["calibrate", "--max-tokens", "x"], "invalid int value: 'x'"),
        (["explain"], "the following arguments are required: --tokens"),
        (["calibrate", "--for", "vllm"], "unrecognized arguments: --for vllm"),
    ],
)
def test_words_that_cannot_be_parsed_are_one_line_that_names_the_help(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert "--help` says what is accepted" in line


def test_another_word_than_a_command_is_one_line_that_names_them(capsys):
    for word in ("nothing", "status", "cache", "bench"):
        assert cli.main([word]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{word!r} is no command: give one of calibrate, list, show" in line


def test_an_empty_folder_holds_no_table(tmp_path, capsys):
    assert cli.main(["show", "--table", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no usable table" in capsys.readouterr().err


def test_aiter_asked_for_by_name_where_there_is_none(tmp_path):
    done = run("calibrate", "--kernel", "aiter", "--model", "deepseek-v3", cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "AITER is not installed" in done.stderr
    assert "run this where the engine serves" in done.stderr


def test_aiter_is_measured_and_kept_for_no_engine(tmp_path):
    """A plain measurement of a shape: an engine's start asks under its own name."""
    shape = ["--experts", "8", "--topk", "2", "--hidden", "64", "--local-experts", "4"]
    how = ["--kernel", "aiter", "--block-size", "64", "--max-tokens", "8", "--budget", "0.5"]
    standin = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "aiter_standin")])
    done = run("calibrate", *shape, *how, cache=tmp_path, PYTHONPATH=standin)
    assert done.returncode == 0, done.stderr
    assert "which is what engines sort with" in done.stdout
    (path,) = stored_files(tmp_path)
    assert f"written to {path}" in done.stdout
    (stored,) = read_any(path)
    found = stored.table.evidence
    assert stored.request.engine == "no engine"
    assert found.kernel.startswith("aiter 0.1.99 opus, ")
    assert found.candidates == ("policy 0", "policy 1", "policy 2")
    assert (found.coverage.shape.block_size, found.coverage.shape.local_experts) == (64, 4)


def test_an_aiter_that_cannot_be_used_is_one_line(tmp_path):
    package = tmp_path / "package" / "aiter"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('no GPU')")
    (package / "fused_moe.py").write_text("# dispatch_policy")
    path = os.pathsep.join([str(ROOT), str(package.parent)])
    words = ["calibrate", "--model", "mixtral-8x7b", "--kernel", "aiter"]
    done = run(*words, cache=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "adaptive-moe calibrate: aiter.fused_moe cannot be imported: no GPU"
    )


def test_without_anything_kept_the_next_step_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path))
    assert cli.main(["show"]) == 2
    assert "run `adaptive-moe calibrate`" in capsys.readouterr().err


def test_a_dense_config_is_one_clear_line(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": 4096}')
    assert cli.main(["calibrate", "--config", str(config)]) == 2
    assert "dense" in capsys.readouterr().err


def test_a_policy_that_is_not_accepted_stops_calibrate_with_the_variable_named(tmp_path):
    done = run("calibrate", *SMALL, cache=tmp_path, ADAPTIVE_MOE_DISPATCH_POLICY="auto,2")
    assert done.returncode == 2
    assert "ADAPTIVE_MOE_DISPATCH_POLICY='auto,2'" in done.stderr


def test_a_full_disk_loses_nothing_that_was_measured(tmp_path, monkeypatch, capsys):
    """The table is printed first; then the file is named, and nothing of it is there."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(cache))

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    assert cli.main(["calibrate", *SMALL]) == 1
    said = capsys.readouterr()
    assert "policy 0 us" in said.out
    last = said.err.splitlines()[-1]
    assert last.startswith(f"adaptive-moe calibrate: {cache}")
    assert last.endswith("No space left on device")
    assert list(cache.iterdir()) == []


def test_a_store_that_cannot_be_written_keeps_nothing_from_the_output(tmp_path):
    file, no_folder = tmp_path / "table.json", tmp_path / "cache"
    no_folder.touch()
    done = run("calibrate", *SMALL, "--output", str(file), cache=no_folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"adaptive-moe calibrate: {no_folder}")
    assert len(read_any(file)) == 1


def test_the_cpu_rehearsal_has_one_thread_of_torch(calibrated):
    """Two that wait for each other take a hundred times as long as the sort."""
    (path,) = stored_files(calibrated)
    (stored,) = read_any(path)
    assert stored.table.evidence.environment.compute_units == 1
