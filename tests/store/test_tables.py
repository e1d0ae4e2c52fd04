"""The order for one table on one rank, over real stores and with a stand-in that measures."""

import logging
from dataclasses import replace

import pytest
import torch.distributed as dist

from adaptive_moe.store.folder import Folder
from adaptive_moe.store.shared import SharedStore
from adaptive_moe.store.tables import Stores, table_for
from adaptive_moe.store.text import to_text
from tests.store.making import KEY, REQUEST, another, made_table

OPEN = (0.7, None)  # policy 2 is left open


class Rank:
    """One rank's starts: its folder, the job's store, and what it measured."""

    def __init__(self, path, store=None):
        self.folder, self.store = Folder(path), store
        self.measured = []

    def start(self, finds=None, *, budget_s=1.5, recalibrate=False, earlier=None):
        """finds: what measuring comes to, a table or an exception; None: it may not be measured."""

        def measure(evidence):
            self.measured.append(evidence)
            assert finds is not None, "measured"
            if isinstance(finds, Exception):
                raise finds
            starts = evidence.starts + 1 if evidence else 1
            return replace(finds, evidence=replace(finds.evidence, starts=starts))

        with SharedStore(lambda: self.store) as shared:
            stores = Stores(self.folder, shared, recalibrate)
            return table_for(KEY, stores, measure, budget_s, earlier)

    @property
    def kept(self):
        return self.folder.get(KEY)


@pytest.fixture
def rank(tmp_path):
    return Rank(tmp_path / "cache")


@pytest.fixture
def ranks(tmp_path):
    """Of one job, each with a folder of its own."""
    store = dist.HashStore()
    return [Rank(tmp_path / str(number), store) for number in range(3)]


def lines(caplog, level=logging.WARNING):
    return [r.getMessage() for r in caplog.records if r.levelno >= level]


# One rank


def test_the_second_start_measures_nothing(rank):
    first = rank.start(another())
    second = rank.start()
    assert (first.origin, first.is_kept) == ("measured", True)
    assert (second.origin, second.is_kept) == ("stored", True)
    assert second.table == first.table == rank.kept


def test_recalibrate_measures_whatever_is_kept_and_keeps_the_new_table(rank):
    rank.start(another())
    new = another()
    assert rank.start(new, recalibrate=True).table == new == rank.kept
    assert rank.measured == [None, None]


def test_where_measuring_fails_nothing_is_kept(rank):
    with pytest.raises(MemoryError):
        rank.start(MemoryError("of the baseline"))
    assert rank.kept is None
    assert rank.start(another()).origin == "measured"


def test_a_candidate_that_is_wrong_stays_out_and_nothing_is_measured_again(rank):
    rank.start(another(0.7, 1.2, wrong=("policy 1",)))
    again = rank.start()
    assert again.origin == "stored"
    assert again.table.candidate(8) == "policy 0"


@pytest.mark.parametrize(
    "left", [another(*OPEN), another(failed=("policy 2",))], ids=["open counts", "failed"]
)
def test_what_is_unfinished_is_continued_by_three_later_starts(rank, left):
    tables = [rank.start(left).table]
    for _ in range(3):
        tables.append(rank.start(left).table)
    rank.start()
    assert rank.measured == [None, *(table.evidence for table in tables[:3])]
    assert rank.kept.evidence.starts == 4


def test_a_larger_budget_continues_whatever_the_number_of_starts(rank):
    rank.start(another(*OPEN))
    rank.folder.replace(KEY, another(*OPEN, starts=4))
    rank.start()
    done = another(budget_s=9.0)
    assert rank.start(done, budget_s=9.0).table.open_counts == 0
    rank.start(budget_s=99.0)


def test_a_larger_budget_that_fails_is_tried_once(rank):
    rank.folder.replace(KEY, another(*OPEN, starts=4))
    for _ in range(2):
        assert rank.start(RuntimeError("HIP error: 719"), budget_s=9.0).origin == "stored"
    assert len(rank.measured) == 1


@pytest.mark.parametrize("budget_s", [1.5, 9.0])
def test_without_a_writable_folder_nothing_is_continued(rank, monkeypatch, budget_s):
    rank.start(another(*OPEN))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert rank.start(budget_s=budget_s).origin == "stored"
    assert len(rank.measured) == 1


def test_what_is_stored_serves_where_continuing_fails_and_the_start_counts(rank, caplog):
    left = rank.start(another(*OPEN)).table
    again = rank.start(RuntimeError("HIP error: 719"))
    assert again.origin == "stored"
    assert again.table.evidence == replace(left.evidence, starts=2) == rank.kept.evidence
    assert "stays as stored: RuntimeError: HIP error: 719" in lines(caplog)[0]


def test_what_is_stored_serves_where_continuing_settles_less_and_the_start_counts(rank):
    left = rank.start(another(*OPEN, eager=another().evidence.eager)).table
    worse = rank.start(another(*OPEN))
    assert worse.origin == "stored"
    assert worse.table.evidence == replace(left.evidence, starts=2) == rank.kept.evidence


def test_evidence_of_a_smaller_coverage_is_used_and_starts_are_counted_anew(rank):
    smaller = another(starts=3).evidence
    assert rank.start(another(), earlier=smaller).table.evidence.starts == 1
    assert rank.measured == [smaller]


def test_a_read_only_folder_serves_and_is_not_written(rank):
    """Root may write anywhere: what counts is that nothing is tried."""
    rank.start(another())
    before = rank.folder.file(KEY).stat().st_mtime_ns
    rank.folder.path.chmod(0o555)
    assert rank.start().is_kept
    assert rank.folder.file(KEY).stat().st_mtime_ns == before


def test_a_disk_that_fails_is_tried_once_a_warm_up(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with SharedStore(lambda: None) as shared:
        stores = Stores(Folder(tmp_path / "file" / "cache"), shared)
        for _ in range(3):
            assert not table_for(KEY, stores, lambda earlier: another(), 1.5).is_kept
    assert len(lines(caplog)) == 1


# Several ranks


def test_the_first_ranks_table_is_every_ranks_and_is_kept_by_all(ranks):
    first, second, third = ranks
    table = first.start(another()).table
    late = second.start()
    assert (late.table, late.origin) == (table, "shared")
    # Measured at the same time: what was published first is adopted.
    third.store, store = dist.HashStore(), third.store
    own = another()

    def publish_meanwhile(key, text):
        return store.compare_set(key, "", text)

    third.store = Interposed(third.store, publish_meanwhile)
    both = third.start(own)
    assert (both.table, both.origin) == (table, "shared")
    assert first.kept == second.kept == third.kept == table


class Interposed:
    """A store that shows nothing before this rank offers its own."""

    def __init__(self, store, compare_set):
        self.store, self._set = store, compare_set

    def check(self, keys):
        return self.store.check(keys)

    def compare_set(self, key, expected, desired):
        return self._set(key, desired)


def test_a_table_from_the_folder_is_published(ranks):
    first, second, _ = ranks
    table = another()
    first.folder.replace(KEY, table)
    first.start()
    assert second.start().table == table


def test_recalibrate_adopts_what_another_rank_measured_anew(ranks):
    first, second, _ = ranks
    second.folder.replace(KEY, another())
    new = first.start(another(), recalibrate=True).table
    assert second.start(recalibrate=True).table == new == second.kept


def test_a_table_in_which_a_candidate_failed_is_not_published(ranks):
    first, second, third = ranks
    first.start(another(failed=("policy 2",)))
    good = second.start(another()).table
    assert second.measured == [None]
    # A rank with a failure of its own takes the others' table.
    third.store = Interposed(third.store, None)
    shows = iter((False, True))
    third.store.check = lambda keys: next(shows)
    third.store.get = second.store.get
    assert third.start(another(failed=("policy 1",))).table == good


def test_a_table_less_settled_than_this_ranks_is_not_adopted_and_a_line_says_so(ranks, caplog):
    first, second, third = ranks
    first.start(another(*OPEN))
    own = another()
    second.folder.replace(KEY, own)
    served = second.start()
    assert (served.table, served.origin) == (own, "stored")
    (line,) = lines(caplog)
    assert "this rank uses its own table: it leaves 0 counts unsettled, the other ranks' 5" in line
    # One as settled as its own is adopted, and replaces it.
    equal = another(*OPEN)
    third.folder.replace(KEY, equal)
    assert third.start().origin == "shared"
    assert third.kept == first.kept


@pytest.mark.parametrize(
    "text",
    [
        "no table",
        to_text(REQUEST, another(kernel="aiter 0.1.8")),
        to_text(REQUEST, another(names=("policy 0", "policy 9", "policy 2"))),
    ],
)
def test_what_another_rank_published_is_read_as_strictly_as_a_file(ranks, caplog, text):
    rank = ranks[0]
    rank.store.set(KEY.name, text)
    own = another()
    assert rank.start(own).table == own
    assert len(lines(caplog)) == 1


def test_a_job_store_that_is_used_again_gives_the_old_jobs_table(tmp_path):
    path = str(tmp_path / "store")
    old = Rank(tmp_path / "old", dist.FileStore(path, 1))
    table = old.start(another()).table
    new = Rank(tmp_path / "new", dist.FileStore(path, 1))
    assert new.start().table == table


def test_made_tables_are_what_they_are_said_to_be():
    assert made_table().candidate(8) == "policy 1"
    assert made_table(*OPEN).open_counts == 5
