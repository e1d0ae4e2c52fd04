"""Every variable: what is accepted, what is refused, and that the refusal can be acted upon."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.kernels.sorts import REGISTRY
from adaptive_moe.settings import (
    NEUTRAL_VARIABLE,
    VARIABLES,
    VLLM_VARIABLE,
    LogDetail,
    Mode,
    Settings,
    SettingsError,
    misspelt,
    parse_buckets,
    parse_budget,
    parse_margin,
    read_for_serving,
    read_settings,
)


@pytest.mark.parametrize("name", [VLLM_VARIABLE, NEUTRAL_VARIABLE])
class TestDispatchPolicy:
    @pytest.mark.parametrize("value", ["auto", "AUTO", " Auto "])
    def test_auto_in_any_case(self, name, value):
        settings = read_settings({name: value})
        assert (settings.mode, settings.fixed_policy) == (Mode.AUTO, None)

    @pytest.mark.parametrize("value", ["0", "1", "2", "255"])
    def test_an_integer_is_a_fixed_override(self, name, value):
        settings = read_settings({name: value})
        assert (settings.mode, settings.fixed_policy) == (Mode.FIXED, int(value))

    @pytest.mark.parametrize("value", ["", "  ", "off", "OFF", "none", "False"])
    def test_off_and_empty_are_off(self, name, value):
        assert read_settings({name: value}) == Settings()

    @pytest.mark.parametrize("value", ["3x", "-1", "auto,2", "1.0", "256", "²", "0x1", "on", "no"])
    def test_anything_else_is_one_error_that_says_what_to_give(self, name, value):
        with pytest.raises(SettingsError) as refused:
            read_settings({name: value})
        text = str(refused.value)
        assert name in text
        assert repr(value) in text
        assert "auto, an integer from 0 to 255, or off" in text


def test_unset_is_off():
    assert read_settings({}).mode is Mode.OFF


def test_both_names_may_agree():
    both = {VLLM_VARIABLE: "AUTO", NEUTRAL_VARIABLE: "auto"}
    assert read_settings(both).mode is Mode.AUTO


def test_both_names_in_conflict_are_told_apart():
    with pytest.raises(SettingsError) as refused:
        read_settings({VLLM_VARIABLE: "auto", NEUTRAL_VARIABLE: "2"})
    assert str(refused.value) == (
        f"{VLLM_VARIABLE}='auto' and {NEUTRAL_VARIABLE}='2' disagree: unset one of them, or give "
        "both the same value"
    )


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("ADAPTIVE_MOE_BUDGET_S", "2.5", "budget_s", 2.5),
        ("ADAPTIVE_MOE_BUDGET_S", "1e-3", "budget_s", 0.001),
        ("ADAPTIVE_MOE_MARGIN", "0", "margin", 0.0),
        ("ADAPTIVE_MOE_MARGIN", "0.5", "margin", 0.5),
        ("ADAPTIVE_MOE_BUCKETS", "1, 8,64", "buckets", (1, 8, 64)),
        ("ADAPTIVE_MOE_CACHE_DIR", "somewhere", "cache_dir", "somewhere"),
        ("ADAPTIVE_MOE_LOG_DETAIL", "Summary", "log_detail", LogDetail.SUMMARY),
        ("ADAPTIVE_MOE_REPORT", "report.json", "report", "report.json"),
        ("ADAPTIVE_MOE_RECALIBRATE", "1", "recalibrate", True),
        ("ADAPTIVE_MOE_RECALIBRATE", "off", "recalibrate", False),
        ("ADAPTIVE_MOE_BUSY_FROM", "1", "busy_from", 1),
        ("ADAPTIVE_MOE_BUSY_FROM", " 1048576", "busy_from", 1048576),
        ("ADAPTIVE_MOE_SORTS", "policies", "sorts", ("policies",)),
        ("ADAPTIVE_MOE_SORTS", "AITER", "sorts", ("policies", "ck", "opus", "flydsl")),
        ("ADAPTIVE_MOE_SORTS", "all", "sorts", ("policies", *REGISTRY)),
        (
            "ADAPTIVE_MOE_SORTS",
            "triton  one-shot, policies",
            "sorts",
            ("policies", "triton one-shot"),
        ),
    ],
)
def test_accepted(name, value, field, expected):
    assert getattr(read_settings({name: value}), field) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADAPTIVE_MOE_BUDGET_S", "0"),
        ("ADAPTIVE_MOE_BUDGET_S", "-1"),
        ("ADAPTIVE_MOE_BUDGET_S", "nan"),
        ("ADAPTIVE_MOE_BUDGET_S", "inf"),
        ("ADAPTIVE_MOE_BUDGET_S", "fast"),
        ("ADAPTIVE_MOE_BUDGET_S", "1e17"),
        ("ADAPTIVE_MOE_BUCKETS", ",".join(map(str, range(1, 4098)))),
        ("ADAPTIVE_MOE_MARGIN", "0.51"),
        ("ADAPTIVE_MOE_MARGIN", "-0.1"),
        ("ADAPTIVE_MOE_MARGIN", "1%"),
        ("ADAPTIVE_MOE_BUCKETS", "8,4"),
        ("ADAPTIVE_MOE_BUCKETS", "4,4"),
        ("ADAPTIVE_MOE_BUCKETS", "0,4"),
        ("ADAPTIVE_MOE_BUCKETS", "1,,4"),
        ("ADAPTIVE_MOE_BUCKETS", "1;4"),
        ("ADAPTIVE_MOE_LOG_DETAIL", "loud"),
        ("ADAPTIVE_MOE_RECALIBRATE", "maybe"),
        ("ADAPTIVE_MOE_BUSY_FROM", "0"),
        ("ADAPTIVE_MOE_BUSY_FROM", "always"),
        ("ADAPTIVE_MOE_BUSY_FROM", "1048577"),
        ("ADAPTIVE_MOE_SORTS", "policies,"),
        ("ADAPTIVE_MOE_SORTS", "oppus"),
    ],
)
def test_refused_by_name_value_and_what_is_accepted(name, value):
    with pytest.raises(SettingsError) as refused:
        read_settings({name: value})
    accepts = next(variable.accepts for variable in VARIABLES if variable.name == name)
    assert f"{name}={value!r}" in str(refused.value)
    assert accepts in str(refused.value)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_budget, "2.5", 2.5),
        (parse_margin, " 0.5", 0.5),
        (parse_buckets, "1, 8,64", (1, 8, 64)),
        (parse_buckets, "7", (7,)),
        (parse_buckets, " ", ()),
    ],
)
def test_options_are_read_as_the_variables_are(parse, text, value):
    assert parse("--option", text) == value


@pytest.mark.parametrize(
    ("parse", "text", "accepts"),
    [
        (parse_budget, "0", "seconds, more than 0 and at most 86400"),
        (parse_budget, "", "seconds, more than 0 and at most 86400"),
        (parse_margin, "1%", "a fraction from 0 to 0.5"),
        (parse_buckets, "8,4", "at most 4096 rising token counts such as 1,8,64,512"),
    ],
)
def test_an_option_that_is_refused_is_named(parse, text, accepts):
    with pytest.raises(SettingsError) as refused:
        parse("--option", text)
    says = f"--option={text!r} is not accepted: give {accepts}, or leave it unset"
    assert str(refused.value) == says


def test_every_variable_of_the_table_is_read():
    class Watched(dict):
        asked: set[str] = set()  # noqa: RUF012

        def get(self, key, default=None):
            self.asked.add(key)
            return super().get(key, default)

    read_settings(Watched())
    assert {variable.name for variable in VARIABLES} == Watched.asked


@given(st.text(alphabet="autof012345-+., x", max_size=6))
def test_any_text_is_off_auto_an_integer_or_an_error(value):
    try:
        settings = read_settings({VLLM_VARIABLE: value})
    except SettingsError:
        assert value.strip().lower() not in ("auto", "off")
        assert not value.strip().isdigit() or int(value) > 255
    else:
        word = value.strip().lower()
        expected = {"": Mode.OFF, "off": Mode.OFF, "auto": Mode.AUTO}.get(word, Mode.FIXED)
        assert settings.mode is expected
        assert settings.fixed_policy == (int(word) if expected is Mode.FIXED else None)


# A server starts whatever the environment holds


BAD = {
    VLLM_VARIABLE: "3x",
    NEUTRAL_VARIABLE: "-1",
    "ADAPTIVE_MOE_BUDGET_S": "fast",
    "ADAPTIVE_MOE_MARGIN": "1%",
    "ADAPTIVE_MOE_BUCKETS": "8,4",
    "ADAPTIVE_MOE_BUSY_FROM": "0",
    "ADAPTIVE_MOE_SORTS": "fastest",
    "ADAPTIVE_MOE_RECALIBRATE": "maybe",
    "ADAPTIVE_MOE_LOG_DETAIL": "loud",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_one_sentence_and_the_default_and_the_others_count(name):
    good = {VLLM_VARIABLE: "auto", "ADAPTIVE_MOE_BUDGET_S": "3", "ADAPTIVE_MOE_MARGIN": "0.2"}
    settings, problems = read_for_serving({**good, name: BAD[name]})
    (problem,) = problems
    variable = next(v for v in VARIABLES if v.name == name)
    assert f"{name}={BAD[name]!r}" in problem
    assert variable.accepts in problem
    assert problem.endswith(f"it counts as {variable.default}")
    assert ("vLLM itself refuses it and does not start" in problem) is (name == VLLM_VARIABLE)
    without = {other: value for other, value in good.items() if other != name}
    assert settings == read_settings(without)


def test_everything_bad_at_once_is_off_and_one_sentence_each():
    settings, problems = read_for_serving(BAD)
    assert settings == Settings()
    assert len(problems) == len(BAD)


def test_two_names_that_differ_are_said_and_the_engines_own_counts():
    both = {VLLM_VARIABLE: "1", NEUTRAL_VARIABLE: "auto"}
    settings, (problem,) = read_for_serving(both)
    assert (settings.mode, settings.fixed_policy) == (Mode.FIXED, 1)
    assert "disagree" in problem
    assert problem.endswith("the first of them counts")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ADAPTIVE_MOE_BUGET_S", "ADAPTIVE_MOE_BUDGET_S"),
        ("ADAPTIVE_MOE_DISPACH_POLICY", "ADAPTIVE_MOE_DISPATCH_POLICY"),
        ("ADAPTIVE_MOE_SORT", "ADAPTIVE_MOE_SORTS"),
        ("ADAPTIVE_MOE", "ADAPTIVE_MOE_DISPATCH_POLICY"),
        ("ADAPTIVE_MOE_", "ADAPTIVE_MOE_DISPATCH_POLICY"),
        ("ADAPTIVE_MOE_POLICY", "ADAPTIVE_MOE_DISPATCH_POLICY"),
        ("ADAPTIVEMOE_BUDGET_S", "ADAPTIVE_MOE_BUDGET_S"),
        ("VLLM_ROCM_AITER_MOE_DISPATCH_POLCY", VLLM_VARIABLE),
        ("VLLM_AITER_MOE_DISPATCH_POLICY", VLLM_VARIABLE),
        ("SGLANG_AITER_MOE_DISPATCH_POLICY", VLLM_VARIABLE),
    ],
)
def test_a_misspelt_name_is_told_what_is_meant(name, meant):
    settings, problems = read_for_serving({VLLM_VARIABLE: "auto", name: "1"})
    assert settings == Settings(mode=Mode.AUTO)
    (problem,) = problems
    assert problem.startswith(f"{name} is not a variable")
    assert problem.endswith(f"did you mean {meant}?")


def test_a_name_like_none_of_ours_is_told_which_there_are():
    (problem,) = misspelt({"ADAPTIVE_MOE_WHATEVER_IT_IS_THAT_NOBODY_EVER_NAMED_SO": "1"})
    assert problem == (
        "ADAPTIVE_MOE_WHATEVER_IT_IS_THAT_NOBODY_EVER_NAMED_SO is not a variable of adaptive_moe "
        "and is not read: there are ADAPTIVE_MOE_DISPATCH_POLICY, ADAPTIVE_MOE_SORTS, "
        "ADAPTIVE_MOE_BUDGET_S, ADAPTIVE_MOE_MARGIN, ADAPTIVE_MOE_BUCKETS, ADAPTIVE_MOE_BUSY_FROM, "
        "ADAPTIVE_MOE_CACHE_DIR, ADAPTIVE_MOE_RECALIBRATE, ADAPTIVE_MOE_LOG_DETAIL, "
        "ADAPTIVE_MOE_REPORT"
    )


def test_names_of_others_are_not_ours_to_judge():
    others = (
        "ADAPTIVE_SOMETHING",
        "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY",
        "VLLM_MOE",
        "VLLM_ROCM_USE_AITER_MOE",
        "VLLM_ROCM_USE_AITER_MOE_SITUV2",
    )
    assert misspelt({NEUTRAL_VARIABLE: "auto", **dict.fromkeys(others, "1")}) == ()


def test_a_number_that_only_we_refuse_does_not_keep_vllm_from_starting():
    _, (problem,) = read_for_serving({VLLM_VARIABLE: "300"})
    assert problem.endswith("; it counts as unset")


@given(st.dictionaries(st.sampled_from([v.name for v in VARIABLES]), st.text(max_size=8)))
def test_reading_for_serving_never_raises(environ):
    settings, problems = read_for_serving(environ)
    if not problems:
        assert settings == read_settings(environ)
