"""Every variable: what is accepted, what is refused, and that the refusal can be acted upon."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.settings import (
    ENGINE_VARIABLE,
    NEUTRAL_VARIABLE,
    VARIABLES,
    LogDetail,
    Mode,
    Settings,
    SettingsError,
    read_settings,
)


@pytest.mark.parametrize("name", [ENGINE_VARIABLE, NEUTRAL_VARIABLE])
class TestDispatchPolicy:
    @pytest.mark.parametrize("value", ["auto", "AUTO", " Auto "])
    def test_auto_in_any_case(self, name, value):
        settings = read_settings({name: value})
        assert (settings.mode, settings.fixed_policy) == (Mode.AUTO, None)

    @pytest.mark.parametrize("value", ["0", "1", "2", "255"])
    def test_an_integer_is_a_fixed_override(self, name, value):
        settings = read_settings({name: value})
        assert (settings.mode, settings.fixed_policy) == (Mode.FIXED, int(value))

    @pytest.mark.parametrize("value", ["", "  "])
    def test_empty_is_off(self, name, value):
        assert read_settings({name: value}) == Settings()

    @pytest.mark.parametrize("value", ["3x", "-1", "auto,2", "1.0", "256", "²", "0x1", "on"])
    def test_anything_else_is_one_error_that_says_what_to_give(self, name, value):
        with pytest.raises(SettingsError) as refused:
            read_settings({name: value})
        text = str(refused.value)
        assert name in text
        assert repr(value) in text
        assert "auto, or an integer from 0 to 255" in text


def test_unset_is_off():
    assert read_settings({}).mode is Mode.OFF


def test_both_names_may_agree():
    both = {ENGINE_VARIABLE: "AUTO", NEUTRAL_VARIABLE: "auto"}
    assert read_settings(both).mode is Mode.AUTO


def test_both_names_in_conflict_are_told_apart():
    with pytest.raises(SettingsError) as refused:
        read_settings({ENGINE_VARIABLE: "auto", NEUTRAL_VARIABLE: "2"})
    assert f"{ENGINE_VARIABLE}='auto'" in str(refused.value)
    assert f"{NEUTRAL_VARIABLE}='2'" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("ADAPTIVE_MOE_BUDGET_S", "2.5", "budget_s", 2.5),
        ("ADAPTIVE_MOE_MARGIN", "0", "margin", 0.0),
        ("ADAPTIVE_MOE_MARGIN", "0.5", "margin", 0.5),
        ("ADAPTIVE_MOE_BUCKETS", "1, 8,64", "buckets", (1, 8, 64)),
        ("ADAPTIVE_MOE_CACHE_DIR", "somewhere", "cache_dir", "somewhere"),
        ("ADAPTIVE_MOE_LOG_DETAIL", "Summary", "log_detail", LogDetail.SUMMARY),
        ("ADAPTIVE_MOE_REPORT", "report.json", "report", "report.json"),
        ("ADAPTIVE_MOE_RECALIBRATE", "1", "recalibrate", True),
        ("ADAPTIVE_MOE_RECALIBRATE", "off", "recalibrate", False),
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
        ("ADAPTIVE_MOE_MARGIN", "0.51"),
        ("ADAPTIVE_MOE_MARGIN", "-0.1"),
        ("ADAPTIVE_MOE_MARGIN", "1%"),
        ("ADAPTIVE_MOE_BUCKETS", "8,4"),
        ("ADAPTIVE_MOE_BUCKETS", "0,4"),
        ("ADAPTIVE_MOE_BUCKETS", "1,,4"),
        ("ADAPTIVE_MOE_BUCKETS", "1;4"),
        ("ADAPTIVE_MOE_LOG_DETAIL", "loud"),
        ("ADAPTIVE_MOE_RECALIBRATE", "maybe"),
    ],
)
def test_refused_by_name_value_and_what_is_accepted(name, value):
    with pytest.raises(SettingsError) as refused:
        read_settings({name: value})
    accepts = next(variable.accepts for variable in VARIABLES if variable.name == name)
    assert f"{name}={value!r}" in str(refused.value)
    assert accepts in str(refused.value)


def test_every_variable_of_the_table_is_read():
    class Watched(dict):
        asked: set[str] = set()  # noqa: RUF012

        def get(self, key, default=None):
            self.asked.add(key)
            return super().get(key, default)

    read_settings(Watched())
    assert {variable.name for variable in VARIABLES} == Watched.asked


@given(st.text(alphabet="auto012345-+., x", max_size=6))
def test_any_text_is_off_auto_an_integer_or_an_error(value):
    try:
        settings = read_settings({ENGINE_VARIABLE: value})
    except SettingsError:
        assert value.strip().lower() != "auto"
        assert not value.strip().isdigit() or int(value) > 255
    else:
        word = value.strip().lower()
        expected = {"": Mode.OFF, "auto": Mode.AUTO}.get(word, Mode.FIXED)
        assert settings.mode is expected
        assert settings.fixed_policy == (int(word) if expected is Mode.FIXED else None)
