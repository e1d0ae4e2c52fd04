"""One table on one rank: from another rank, from the folder, or measured; then offered to both.

    shared.get, folder.get       what is stored already; where it is finished, nothing is measured
    measure                      else, or to continue what an earlier start left unfinished
    shared.put_if_absent         the first rank's table is every rank's, unless it is worse here
    folder.replace               what serves, where that is news and no step back

There is no other agreement between ranks, and no rank waits for another.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from adaptive_moe.policy.evidence import Evidence
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.store.folder import Folder
from adaptive_moe.store.key import TableKey, differing_fields
from adaptive_moe.store.shared import SharedStore
from adaptive_moe.store.text import from_text, to_text

logger = logging.getLogger("adaptive_moe")

# At most so many later starts continue an unfinished table.
MORE_STARTS = 3

# Measures, continuing from that evidence where there is some; raises where it cannot.
Measure = Callable[[Evidence | None], PolicyTable]


@dataclass
class Stores:
    """Both stores during one warm-up. recalibrate: the folder is written, but not read."""

    folder: Folder
    shared: SharedStore
    recalibrate: bool = False
    # A disk that is full or read-only stays so: after one warning nothing more is written.
    keeps: bool = True


@dataclass(frozen=True)
class Served:
    """The table that serves, and its origin.

    origin   "stored" in the folder, "measured" here now, or "shared" by another rank
    is_kept  is it in the folder for later starts?
    """

    table: PolicyTable
    origin: str
    is_kept: bool


def table_for(
    key: TableKey,
    stores: Stores,
    measure: Measure,
    budget_s: float,
    earlier: Evidence | None = None,
) -> Served:
    """The table of that key for this rank.

    earlier: evidence of a smaller coverage, to continue from where nothing is stored. Raises what
    `measure` raises where nothing is stored either; then nothing is kept.
    """
    text = stores.shared.get(key)
    shared = _parsed(key, text)
    stored = None if stores.recalibrate else stores.folder.get(key)
    if shared is not None and _may_replace(shared, stored, key):
        return _keep(key, stores, stored, shared, "stored" if shared == stored else "shared")
    if stored is None:
        # Starts are counted from 1 for each key, also with evidence of a smaller coverage.
        table, origin = _as_start(measure(earlier), 1), "measured"
    elif _continues(stored, budget_s, stores.folder):
        table, origin = _continued(key, stored, measure, budget_s, stores.folder.level)
    else:
        table, origin = stored, "stored"
    agreed = _offered(key, stores, table) if text is None else None
    if agreed is not None and agreed != table and _may_replace(agreed, table, key):
        return _keep(key, stores, stored, agreed, "shared")
    return _keep(key, stores, stored, table, origin)


def _parsed(key: TableKey, text: str | None) -> PolicyTable | None:
    """Another rank's table, read as strictly as a file."""
    if text is None:
        return None
    try:
        stored = from_text(text)
        if stored.key != key:
            raise ValueError(f"it is for another {', '.join(differing_fields(key, stored.key))}")
        return stored.table
    except Exception as error:
        logger.warning("%s of another rank is not used: %s", key.name, error)
        return None


def _may_replace(shared: PolicyTable, own: PolicyTable | None, key: TableKey) -> bool:
    """Is another rank's table at least as settled as this rank's? If not, a line says so."""
    if own is None or shared.open_counts <= own.open_counts:
        return True
    logger.warning(
        "%s: this rank uses its own table: it leaves %d counts unsettled, the other ranks' %d",
        *(key.coverage.describe(), own.open_counts, shared.open_counts),
    )
    return False


def continues_later(table: PolicyTable) -> bool:
    """Will a later start with the same budget measure a stored table further?"""
    return table.unfinished and table.evidence.starts <= MORE_STARTS


def _continues(stored: PolicyTable, budget_s: float, folder: Folder) -> bool:
    """Is a stored table to be measured further? Without a writable folder every start would do so
    for ever."""
    has_larger_budget = stored.open_counts > 0 and budget_s > stored.evidence.budget_s
    return (has_larger_budget or continues_later(stored)) and folder.is_writable


def _as_start(table: PolicyTable, starts: int) -> PolicyTable:
    """The same table, measured by so many starts."""
    if table.evidence.starts == starts:
        return table
    return PolicyTable(replace(table.evidence, starts=starts))


def _continued(
    key: TableKey, stored: PolicyTable, measure: Measure, budget_s: float, level: int
) -> tuple[PolicyTable, str]:
    """The stored table measured further, and its origin. Where that fails or settles less, the
    stored one serves; the start counts all the same, or every later start would try again."""
    found, phrase = stored.evidence, key.coverage.describe()
    logger.log(
        level,
        "%s: continuing the table of %s: %d counts unsettled%s, start %d",
        *(phrase, found.created, stored.open_counts),
        *(", a candidate failed" if stored.failed else "", found.starts + 1),
    )
    # With that budget: a larger one is a reason to continue only until it was tried.
    tried = PolicyTable(replace(found, budget_s=max(found.budget_s, budget_s)))
    try:
        table = measure(found)
    except Exception as error:
        logger.warning("%s stays as stored: %s: %s", phrase, type(error).__name__, error)
        return _as_start(tried, found.starts + 1), "stored"
    if table.open_counts > stored.open_counts:
        return _as_start(tried, found.starts + 1), "stored"
    return _as_start(table, found.starts + 1), "measured"


def _offered(key: TableKey, stores: Stores, table: PolicyTable) -> PolicyTable | None:
    """Offer the table to the other ranks; what they use from now on. A table in which a candidate
    failed is not offered: the failure may be this rank's alone, and of the moment."""
    if table.failed:
        return _parsed(key, stores.shared.get(key))
    return _parsed(key, stores.shared.put_if_absent(key, to_text(key.request, table)))


def _keep(
    key: TableKey,
    stores: Stores,
    stored: PolicyTable | None,
    table: PolicyTable,
    origin: str,
) -> Served:
    """Keep what serves for later starts, where that is news and no step back."""
    is_kept = table == stored
    is_step_back = stored is not None and table.open_counts > stored.open_counts
    if not is_kept and not is_step_back and stores.keeps:
        is_kept = stores.keeps = stores.folder.replace(key, table)
    return Served(table, origin, is_kept)
