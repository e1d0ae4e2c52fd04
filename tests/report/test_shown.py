"""The page, the plot and the texts of tables, whole, as people see them."""

import pytest

from tests.report.shown import HERE, SEEN


@pytest.mark.parametrize("name", SEEN)
def test_people_see_what_they_saw(name):
    assert SEEN[name]() == (HERE / name).read_text(encoding="utf-8")
