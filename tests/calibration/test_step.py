"""calibration.step: sums done by hand, and a rehearsal on the CPU."""

from argparse import ArgumentParser
from types import ModuleType

import pytest
import torch

from adaptive_moe.kernels import Candidate
from adaptive_moe.models import find_model
from adaptive_moe.shape import SortingShape
from calibration import noise, seams, step
from calibration.layer import layer_sizes
from calibration.losses import Point, figures, overall
from calibration.noise import Difference, dense, differences
from calibration.timing import AS_IT_COMES
from tests.tables import make_table

P0, P1, OTHER = "policy 0", "policy 1", "triton"


def at(num_tokens, *us, policies=P0, every=P0):
    times = {name: [float(t)] * 8 for name, t in zip((P0, P1, OTHER), us, strict=True)}
    return Point(num_tokens, times, {"policies": policies, "all": every})


POINTS = [
    at(1, 100, 90, 80, policies=P1, every=OTHER),
    at(64, 100, 110, 120),
    at(2048, 100, 98, 99, policies=P1, every=P0),
]


def test_a_table_is_judged_against_the_best_of_its_own_candidates():
    sets = figures(POINTS)["sets"]
    table = sets["policies"]["table"]
    assert (table["mean_loss"], table["worst_loss"], table["counts"]) == (0.0, 0.0, 3)
    assert table["mean_saved"] == pytest.approx((0.10 + 0.0 + 0.02) / 3, abs=1e-6)
    assert table["most_saved"] == pytest.approx(0.10)
    assert table["worst_over_baseline"] == 0.0
    assert sets["policies"][P0]["worst_loss"] == pytest.approx(10 / 90, abs=1e-6)
    assert sets["policies"][P1]["worst_at"] == 64
    assert OTHER not in sets["policies"]


def test_among_all_sorts_both_tables_are_judged():
    every = figures(POINTS)["sets"]["all"]
    assert every["table"]["worst_at"] == 2048
    assert every["table"]["worst_loss"] == pytest.approx(2 / 98, abs=1e-6)
    # Every round says the same, so all of it is sure.
    assert every["table"]["worst_surely"] == every["table"]["worst_loss"]
    assert every["table of policies"]["worst_loss"] == pytest.approx(10 / 80)
    assert every[OTHER]["worst_over_baseline"] == pytest.approx(0.2)


def test_figures_are_split_where_the_device_alone_decides():
    table = figures(POINTS, busy_from=512)["sets"]["all"]["table"]
    assert table["below 512"]["counts"] == 2
    assert table["below 512"]["worst_loss"] == 0.0
    assert table["from 512"]["worst_at"] == 2048
    assert "below 1" not in figures(POINTS, busy_from=1)["sets"]["all"]["table"]


def test_overall_has_means_of_means_and_the_worst_of_the_worst():
    shapes = [{"captured": figures(POINTS)}, {"captured": figures(POINTS[:1])}]
    found = overall(shapes)["captured"]["policies"][P0]
    one, two = (s["captured"]["sets"]["policies"][P0] for s in shapes)
    assert found["shapes"] == 2
    assert found["mean_loss"] == pytest.approx((one["mean_loss"] + two["mean_loss"]) / 2, abs=1e-6)
    assert found["worst_loss"] == one["worst_loss"]
    assert "worst_at" not in found


def test_what_took_no_part_at_a_count_is_not_judged_there():
    found = figures([at(1, 100, 90, 80), Point(2, {P0: [10.0] * 8}, {"policies": P0, "all": P0})])
    assert found["sets"]["all"][OTHER]["counts"] == 1
    assert found["sets"]["all"]["table"]["counts"] == 2


def test_a_switch_answers_by_the_candidate_in_use_and_is_gone_afterwards():
    module, log = ModuleType("seam"), []
    module.moe_sorting = lambda *arguments, **named: log.append((arguments[8], named)) or "seam's"
    original = module.moe_sorting
    ids = torch.zeros((4, 2), dtype=torch.int32)
    call = (ids, ids.float(), 8, 64, torch.float32, 32, None, None, 2)
    with seams.Switch(module) as switch:
        assert module.moe_sorting(*call, accumulate=True) == "seam's"
        switch.use = Candidate("mine", lambda inputs: lambda: inputs.topk_ids.shape)
        assert module.moe_sorting(*call) == (4, 2)
    assert log == [(2, {"accumulate": True})]
    assert module.moe_sorting is original


def test_wrong_and_raising_candidates_are_left_out():
    seam = seams.open_seam("cpu")
    (inputs,) = step.inputs_of(SortingShape(8, 2, 16, "float32"), 4, 1, seam.device)
    shape = SortingShape(8, 2, 16, "float32")
    (seen,) = seams.see(seam, shape, seams.sort_calls(seam, shape), (2, 4), ())
    assert (seen.counts, seen.coverage.max_tokens) == ((2, 4), 4)
    good, other = seen.kernel.candidates[:2]
    wrong = Candidate("wrong", lambda _: other.bind(step.inputs_of(shape, 4, 2, seam.device)[1]))
    raises = Candidate("raises", lambda _: lambda: 1 / 0)
    kernel = seams.replace(seen.kernel, candidates=(good, other, wrong, raises))
    kept, left_out = seams.without_wrong(kernel, inputs)
    assert [c.name for c in kept.candidates] == [good.name, other.name]
    assert left_out["raises"] == "ZeroDivisionError: division by zero"
    assert "sorted_ids" in left_out["wrong"]


def options(*words):
    parser = ArgumentParser()
    step.add_options(parser)
    return parser.parse_args(words)


def test_a_rehearsal_on_the_cpu_has_every_part():
    words = ("--kernel", "cpu", "--models", "qwen3-30b", "--eager", "1,4", "--layers", "1")
    found = step.run(options(*words, "--seconds", "0", "--budget", "0.2"))
    shape = found["shapes"]["qwen3-30b"]
    assert list(shape["situations"]) == [AS_IT_COMES]
    rows = shape["situations"][AS_IT_COMES]["sweep"]
    assert [row["num_tokens"] for row in rows] == [1, 4]
    assert list(rows[0]["us_per_layer"]) == ["policy 0", "policy 1", "policy 2"]
    assert set(found["overall"][AS_IT_COMES]) == {"policies", "all"}
    assert {"command", "date", "environment"} <= found.keys()


def test_a_model_that_fails_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(step, "judge", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    found = step.run(options("--kernel", "cpu", "--models", "qwen3-30b"))
    assert found["shapes"]["qwen3-30b"]["failed"] == "RuntimeError: no memory"
    assert found["overall"] == {}


def test_a_model_without_step_sizes_is_refused():
    with pytest.raises(ValueError, match="tensor-parallel"):
        layer_sizes(find_model("qwen3-30b"), 0, 32, "float32")


def test_repeated_calibrations_differ_in_runs_of_counts():
    tables = [make_table({1: 1, 4: 2, 9: 0}), make_table({1: 1, 3: 0, 9: 0})]
    assert list(differences(tables, range(1, 10), captured=False)) == [
        Difference((2, 3, 4), ("policy 0", "policy 2"))
    ]
    assert dense(64)[:5] == [1, 2, 3, 4, 5]
    assert dense(64)[-1] == 64


def test_a_difference_counts_unless_it_is_a_tie(monkeypatch):
    seam = seams.open_seam("cpu")
    shape = SortingShape(8, 2, 16, "float32")
    (seen,) = seams.see(seam, shape, seams.sort_calls(seam, shape), (2, 16), ())
    tables = [make_table({4: 1, 16: 2}), make_table({4: 1, 9: 2, 16: 0})]
    args = options("--budget", "1", "--seconds", "0")
    found = {}
    for tie in (False, True):
        made = iter(tables)
        monkeypatch.setattr(noise, "calibrate", lambda *_, made=made: next(made))
        monkeypatch.setattr(noise, "is_tie", lambda *_, tie=tie, **__: tie)
        found[tie] = noise.repeatability(seam, None, seen, "policies", 2, args)["eager"]
    assert found[False]["repeatability"] < 1.0
    assert found[False]["differ"] == [[10, 16, "policy 0", "policy 2"]]
    assert (found[True]["repeatability"], found[True]["ties"]) == (
        1.0,
        found[False]["counts"] - found[True]["same"],
    )
    assert found[True]["differ"] == []


@pytest.mark.parametrize(
    ("alone", "in_step", "tie"),
    [(1.005, 1.5, True), (1.2, 1.0, True), (1.2, 1.1, False)],
    ids=["within the margin alone", "the step cannot tell", "the step tells them apart"],
)
def test_a_tie_is_one_alone_or_in_the_step(monkeypatch, alone, in_step, tie):
    seam = seams.open_seam("cpu")
    monkeypatch.setattr(noise, "interleave", lambda *_: {P0: [1.0] * 9, P1: [alone] * 9})
    times = {P0: [1.0] * 9, P1: [in_step] * 9}
    monkeypatch.setattr(step.Judge, "times", lambda *_: times)
    sizes = layer_sizes(find_model("qwen3-30b"), 8, 32, seam.dtype)
    judge = step.Judge(seam, sizes, 4, 1, 0)
    (seen,) = seams.see(seam, sizes.shape, seams.sort_calls(seam, sizes.shape), (2, 4), ())
    one = Difference((2, 3, 4), (P0, P1))
    assert noise.is_tie(seam, judge, seen.kernel, one, 0.0, captured=False) is tie


def test_identical_candidates_are_counted_by_buckets(monkeypatch):
    seam = seams.open_seam("cpu")
    shape = SortingShape(8, 2, 16, "float32")
    (seen,) = seams.see(seam, shape, seams.sort_calls(seam, shape), (2, 16), ())
    kernel = noise.identical(seen.kernel)
    assert {c.bind for c in kernel.candidates} == {seen.kernel.baseline.bind}
    monkeypatch.setattr(noise, "calibrate", lambda *_: make_table({1: 0, 2: 2, 16: 0}))
    found = noise.a_a([seen], 5, None)
    assert found == {"aa_calibrations": 2, "aa_buckets": 8, "aa_left": 2}
