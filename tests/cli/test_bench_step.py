"""bench step and bench sorts on the CPU kernel, through the real hook."""

import argparse
import json
from types import ModuleType

import pytest
import torch

from adaptive_moe.cli.bench import seams, sorts, step
from adaptive_moe.cli.bench.layer import layer_sizes
from adaptive_moe.cli.bench.seams import kernel_at, open_seam, seam_of
from adaptive_moe.cli.bench.variants import TABLE, Variants, only
from adaptive_moe.engines import warm_up as warming
from adaptive_moe.kernels import KernelUnavailableError, cpu_sort
from adaptive_moe.models import Model, find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.settings import Settings
from adaptive_moe.shape import SortingShape
from tests.tables import make_table, measure_as

SHAPE = SortingShape(16, 4, 64, "float32")
MODEL = Model("small", 16, 4, 64, "made up", moe_intermediate_size=96, attention=(256, 128))


@pytest.fixture
def arrived():
    """What policies arrive at the sort, below every wrapper, with their token counts."""
    return []


@pytest.fixture
def seam(arrived, monkeypatch):
    def sort(topk_ids, *arguments):
        arrived.append((topk_ids.shape[0], arguments[-1]))
        return cpu_sort.moe_sorting(topk_ids, *arguments)

    threads = torch.get_num_threads()
    yield seam_of("cpu", sort)
    torch.set_num_threads(threads)


@pytest.fixture
def decided(monkeypatch):
    """Calibrations say policy 2 around 8 tokens and 1 at 16, and take no time."""
    monkeypatch.setattr(warming, "_calibrate", measure_as({8: 2, 16: 1}))


def sizes_of(seam):
    return layer_sizes(MODEL, tensor_parallel=2, block_size=32, dtype=seam.dtype)


def judge(seam, **options):
    given = {"captured": (), "eager": (1, 8, 16), "layers": 2, "seconds": 0.0, **options}
    return step.judge_model(seam, sizes_of(seam), settings=Settings(), **given)


def test_a_variant_is_what_arrives_at_the_sort(seam, arrived, decided):
    layer = step.Step(sizes_of(seam), 16, seam.device)
    experts = seam.experts(SHAPE, 0)
    original = seam.module.moe_sorting

    def run(num_tokens):
        arrived.clear()
        layer.run(num_tokens, 2, experts)
        return arrived[:]

    with Variants(seam.module, run, (8, 16, 1), (), Settings(), 0) as variants:
        assert variants.at(8) == ["policy 0", "policy 1", "policy 2", TABLE]
        for variant, policies in (
            ("policy 0", (0, 0)),
            ("policy 2", (2, 2)),
            (TABLE, (2, 1)),
            ("policy 1", (1, 1)),
        ):
            variants.use(variant)
            assert run(8) == [(8, policies[0])] * 2  # a sort in each of two layers
            assert run(16) == [(16, policies[1])] * 2
        assert [variants.choice(n, captured=False) for n in (1, 8, 16)] == [
            *("policy 2", "policy 2", "policy 1")
        ]
        assert variants.hook.counts().unknown <= 2 * 3  # only while shapes were being seen
    assert seam.module.moe_sorting is original
    assert variants.hook.layer is None


def test_the_seam_is_put_back_when_no_table_is_made(seam, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(warming, "_calibrate", fail)
    original = seam.module.moe_sorting
    with pytest.raises(RuntimeError, match="out of memory"):
        judge(seam)
    assert seam.module.moe_sorting is original


def test_another_baseline_is_what_the_engine_passes(seam, arrived, decided):
    found = judge(seam, baseline=2)
    rows = found["situations"]["as_it_comes"]["sweep"]
    assert list(rows[0]["us_per_layer"]) == ["policy 2", "policy 0", "policy 1", TABLE]
    # Index 1 of the candidates is policy 0 now.
    assert [row["chosen"] for row in rows] == ["policy 1", "policy 1", "policy 0"]


def test_the_judge_looks_the_choice_up_in_what_it_measured(seam, decided):
    found = judge(seam)
    assert list(found["situations"]) == ["as_it_comes"]  # all there is on a CPU
    situation = found["situations"]["as_it_comes"]
    for row in situation["sweep"]:
        us = {n: t for n, t in row["us_per_layer"].items() if n != TABLE}
        assert row["lost"][row["chosen"]] == pytest.approx(
            us[row["chosen"]] / min(us.values()) - 1.0, abs=1e-3
        )
    assert [row["chosen"] for row in situation["sweep"]] == ["policy 2", "policy 2", "policy 1"]
    assert found["calls"]["chosen"] > 0
    assert found["calls"]["failed"] == found["calls"]["fell_back"] == 0


def test_whom_the_table_chooses_stays_in_the_rounds_after_a_stall(seam, decided):
    """Nothing else says what the choice costs; another candidate that far behind is no rival."""

    class Stalled:
        """Policies 1 and 2 take ten times as long in their first three samples."""

        def __init__(self, variants):
            self.variants = variants

        def as_it_comes(self, run):
            name = self.variants.used
            times = iter([100.0] * 3 if name in ("policy 1", "policy 2") else [])
            return lambda: next(times, 10.0)

    class Used(Variants):
        used = ""

        def use(self, variant):
            self.used = variant
            super().use(variant)

    layer = step.Step(sizes_of(seam), 16, seam.device)
    experts = seam.experts(SHAPE, 0)
    run = lambda n: layer.run(n, 1, experts)  # noqa: E731
    with Used(seam.module, run, (8, 16), (), Settings(), 0) as variants:
        judged = step._Judged(layer, experts, variants, Stalled(variants), 1, 0.0)
        point = judged.point("as_it_comes", 8)
    assert point.chosen == "policy 2"
    assert point.us == {"policy 0": 10.0, "policy 1": 100.0, "policy 2": 10.0, TABLE: 10.0}


def test_what_is_wrong_in_a_calibration_is_no_variant(seam, monkeypatch):
    def sort(*arguments):
        outputs = cpu_sort.moe_sorting(*arguments)
        if arguments[-1] == 1:
            outputs[0].fill_(0)
        return outputs

    wrong = seam_of("cpu", sort)
    layer = step.Step(sizes_of(wrong), 8, wrong.device)
    experts = wrong.experts(SHAPE, 0)
    settings = Settings(budget_s=0.2)
    run = lambda n: layer.run(n, 1, experts)  # noqa: E731
    with Variants(wrong.module, run, (8,), (), settings, 0) as variants:
        assert variants.at(8) == ["policy 0", "policy 2", TABLE]


def test_a_model_that_fails_costs_itself_alone(monkeypatch):
    judged = step.judge_model

    def judge_but_one(seam, sizes, **options):
        if sizes.shape.num_experts == 64:
            raise RuntimeError("out of memory")
        return judged(seam, sizes, **options)

    monkeypatch.setattr(step, "judge_model", judge_but_one)
    monkeypatch.setattr(warming, "_calibrate", measure_as({1: 1}))
    found = step.run(options(step, "--models", "deepseek-v2-lite,qwen3-30b", "--eager", "1,4"))
    assert found["shapes"]["deepseek-v2-lite"]["failed"] == "RuntimeError: out of memory"
    assert set(found["overall"]) == {"as_it_comes"}
    assert json.loads(json.dumps(found)) == found
    assert any("out of memory" in line for line in step.lines(found))
    with pytest.raises(RuntimeError, match="out of memory"):
        step.run(options(step, "--models", "deepseek-v2-lite"))


def options(bench, *words):
    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    quick = ["--layers", "1", "--seconds", "0"] if bench is step else ["--seconds", "0"]
    return parser.parse_args([*quick, "--kernel", "cpu", *words])


def test_a_table_that_names_one_candidate_everywhere():
    table = make_table({1: 0, 64: 1}, {8: 2}, candidates=("policy 2", "policy 0", "ck"))
    assert only(table, "ck").runs() == [(1, 64, "ck")]
    assert only(table, "ck").runs(captured=True) == [(1, 64, "ck")]
    assert only(table, "flydsl").runs() == [(1, 64, "policy 2")]  # not offered there


def test_sizes_are_a_ranks_part_in_whole_tiles():
    sizes = layer_sizes(find_model("gpt-oss-120b"), 8, 32, "float16")
    assert (sizes.width, sizes.attention) == (384, (640, 512))  # 2,880 over 8 is 360
    with pytest.raises(ValueError, match="has no step sizes"):
        layer_sizes(Model("x", 8, 2, 64, "made up"), 8, 32, "float16")
    with pytest.raises(ValueError, match="--tensor-parallel 0"):
        layer_sizes(MODEL, 0, 32, "float16")


def test_a_step_runs_each_layer_on_what_the_last_one_left(seam):
    layer = step.Step(sizes_of(seam), 8, seam.device)
    given = []

    def experts(x, weights, ids, w13, w2):
        assert ids.dtype == torch.int32
        assert (ids.shape, w13.shape, w2.shape) == ((5, 4), (16, 128, 64), (16, 64, 64))
        given.append(x)
        return torch.ones_like(x)

    layer.project.zero_()  # what is left is the experts' part
    assert torch.allclose(layer.run(5, 3, experts), layer.x[:5] + 3.0, atol=1e-5)
    assert len(given) == 3


def test_every_sort_of_a_seam_is_timed_beside_recorded_times(tmp_path):
    path = tmp_path / "times.csv"
    path.write_text(
        "model,tokens,mode,a_sort_us\nqwen3-30b,4,eager,12.5\nqwen3-30b,4,graph,3\nother,4,eager,1\n"
    )
    words = ("--models", "qwen3-30b", "--counts", "1,4", "--against", str(path))
    found = sorts.run(options(sorts, *words))
    assert found["against"] == "times.csv"
    rows = found["shapes"]["qwen3-30b"]["situations"]["busy"]
    assert [row["num_tokens"] for row in rows] == [1, 4]
    policies = ["policy 0", "policy 1", "policy 2"]
    assert found["shapes"]["qwen3-30b"]["sorts"] == list(rows[0]["us"]) == policies
    assert list(rows[1]["us"]) == [*policies, "recorded a sort"]
    best = min(rows[1]["us"][name] for name in policies)
    assert rows[1]["ratio"]["recorded a sort"] == pytest.approx(12.5 / best, abs=1e-4)
    text = list(sorts.lines(found))
    assert text[0].startswith("qwen3-30b, busy")
    assert sum("*" in line for line in text[2:]) == 2  # the fastest here, at each count
    assert "12.50 " in text[-1]


def test_a_sort_that_is_wrong_is_left_out_and_said():
    def sort(*arguments):
        outputs = cpu_sort.moe_sorting(*arguments)
        if arguments[-1] == 2:
            outputs[0].fill_(0)
        if arguments[-1] == 1:
            raise RuntimeError("no such kernel")
        return outputs

    found = sorts.sweep(seam_of("cpu", sort), MODEL, (4,), 32, 0.0)
    assert list(found["situations"]["busy"][0]["us"]) == ["policy 0"]
    assert "sorted_ids" in found["left_out"]["policy 2"]
    assert found["left_out"]["policy 1"] == "at 4 tokens: RuntimeError: no such kernel"


def test_a_plot_is_drawn(tmp_path):
    path = tmp_path / "times.png"
    sorts.run(options(sorts, "--models", "qwen3-30b", "--counts", "1,4", "--plot", str(path)))
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_kernel_is_what_the_hook_offers_and_the_hook_is_gone_after(seam):
    original = seam.module.moe_sorting
    with kernel_at(seam, Coverage.up_to(SHAPE, 64), "policies") as kernel:
        assert [c.name for c in kernel.candidates] == ["policy 0", "policy 1", "policy 2"]
        assert seam.module.moe_sorting is not original
    assert seam.module.moe_sorting is original


def test_a_seam_that_is_none_and_a_kernel_that_is_not_here(seam, monkeypatch):
    broken = seams.Seam("cpu", ModuleType("nothing"), seam.device, "float32", seam.experts)
    with (
        pytest.raises(RuntimeError, match="not installed"),
        kernel_at(broken, Coverage.up_to(SHAPE, 64), "policies"),
    ):
        pass
    none = argparse.Namespace(problem="no AITER")
    monkeypatch.setattr("adaptive_moe.kernels.aiter.find_aiter", lambda: none)
    with pytest.raises(KernelUnavailableError, match="no AITER"):
        open_seam("aiter")
