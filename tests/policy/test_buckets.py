"""Token counts to measure, and the one mapper from a count to its bucket."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.buckets import bucket_of, first_buckets, halfway
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from tests.tables import make_evidence, winning

quick = settings(max_examples=100)
counts = st.sets(st.integers(1, 300), min_size=1, max_size=12).map(sorted)


@quick
@given(counts, st.integers(1, 1000))
def test_every_count_maps_to_the_smallest_bucket_not_below_it_or_the_last(
    buckets: list[int], num_tokens: int
) -> None:
    served_by = buckets[bucket_of(num_tokens, buckets)]
    not_below = [b for b in buckets if b >= num_tokens]
    assert served_by == min(not_below, default=buckets[-1])


@quick
@given(counts, st.data())
def test_lookup_reads_the_candidate_of_the_bucket_that_tuning_mapped_to(
    buckets: list[int], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, 2), min_size=len(buckets), max_size=len(buckets)))
    measured = [winning(n, index) for n, index in zip(buckets, chosen, strict=True)]
    table = PolicyTable(make_evidence(measured))
    for num_tokens in range(1, buckets[-1] + 1):
        served_by = bucket_of(num_tokens, buckets)
        if buckets[served_by] == num_tokens:
            assert table.candidate(num_tokens) == f"policy {chosen[served_by]}"
        found = table.choice_at(num_tokens, Situation.EAGER)
        assert found is not None
        assert found.num_tokens == buckets[served_by]


@pytest.mark.parametrize(("num_tokens", "buckets"), [(0, [1]), (-1, [1, 2]), (1, [])])
def test_what_has_no_bucket_is_an_error(num_tokens: int, buckets: list[int]) -> None:
    with pytest.raises(ValueError, match=f"num_tokens={num_tokens}"):
        bucket_of(num_tokens, buckets)


def test_the_first_buckets_are_powers_of_two_and_the_ends() -> None:
    assert first_buckets(range(1, 101)) == (1, 2, 4, 8, 16, 32, 64, 100)
    assert first_buckets(range(1, 65)) == (1, 2, 4, 8, 16, 32, 64)
    assert first_buckets((24, 48, 96)) == (24, 48, 96)


def test_wanted_buckets_move_up_to_counts_that_can_occur() -> None:
    sizes = (1, 2, 4, 8, 24, 40)
    assert first_buckets(sizes, (3, 9, 25, 400)) == (1, 4, 24, 40)
    assert first_buckets(range(1, 101), (10,)) == (1, 10, 100)


@quick
@given(counts, counts)
def test_first_buckets_rise_lie_in_the_domain_and_hold_its_ends(
    domain: list[int], wanted: list[int]
) -> None:
    for found in (first_buckets(domain), first_buckets(domain, wanted)):
        assert list(found) == sorted(set(found))
        assert set(found) <= set(domain)
        assert {domain[0], domain[-1]} <= set(found)


def test_an_empty_domain_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^no token count to measure: the domain is empty$"):
        first_buckets(())


@quick
@given(counts, st.data())
def test_halfway_is_strictly_inside_and_none_only_for_neighbours(
    domain: list[int], data: st.DataObject
) -> None:
    low = data.draw(st.sampled_from(domain))
    high = data.draw(st.sampled_from([n for n in domain if n >= low]))
    inside = [n for n in domain if low < n < high]
    middle = halfway(domain, low, high)
    assert (middle in inside) if inside else (middle is None)


def test_halfway_halves_the_ratio() -> None:
    assert halfway(range(1, 10_000), 16, 4096) == 256
    assert halfway((1, 16, 200, 300, 4096), 16, 4096) == 300
