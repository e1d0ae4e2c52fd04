"""Failures that pass are never stored: a few of the warm-ups of `make faults`."""

from tests.faults import passing


def test_what_failed_once_is_not_stored_and_the_next_start_measures():
    found = passing.run(6)
    assert found["failures"] == {}
    assert sum(found["outcomes"].values()) == 6
    assert {outcome.partition(":")[0] for outcome in found["outcomes"]} == {
        "out_of_memory",
        "error",
        "wrong_output",
    }
