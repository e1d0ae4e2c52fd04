"""What is about to serve by a table of a store is compared with the baseline once before.

A stored table was right where it was measured. Here the binary, the driver or the file may be
another one. The comparison is also each candidate's first call, in which kernels may compile: that
must happen neither in a served batch nor while a graph is captured.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from adaptive_moe.kernels import SortKernel
from adaptive_moe.policy.table import PolicyTable

if TYPE_CHECKING:
    from torch import Tensor

    from adaptive_moe.tuning.rounds import Exclusions

_Counts = dict[str, set[int]]


def checked(table: PolicyTable, kernel: SortKernel, expert_mask: "Tensor | None") -> PolicyTable:
    """The table, less each candidate that it chooses and that fails or returns something else than
    the baseline, by uniform or skewed routing, at its smallest or largest count; one line each.

    Raises CalibrationFailedError where the baseline fails. Run it where the seen call ran.
    """
    from adaptive_moe.tuning.inputs import default_mask
    from adaptive_moe.tuning.rounds import Exclusions

    coverage = table.evidence.coverage
    exclusions = Exclusions(coverage.baseline, coverage.describe())
    mask = default_mask(coverage.shape, kernel.device) if expert_mask is None else expert_mask
    known: set[str] = set()
    # Without one candidate the table may choose another, which then is checked, too.
    while new := {n: counts for n, counts in _chosen(table).items() if n not in known}:
        known |= new.keys()
        _check(kernel, table, new, mask, exclusions)
        if exclusions.by_name:
            excluded = (*table.evidence.excluded, *exclusions.by_name.values())
            table = PolicyTable(replace(table.evidence, excluded=tuple(dict.fromkeys(excluded))))
    return table


def _chosen(table: PolicyTable) -> _Counts:
    """The smallest and the largest count of each candidate that is chosen in the baseline's
    place."""
    ends: _Counts = {}
    for first, last, name in (*table.runs(), *table.runs(captured=True)):
        if name != table.evidence.coverage.baseline:
            ends.setdefault(name, set()).update((first, last))
    return {name: {min(counts), max(counts)} for name, counts in ends.items()}


def _check(
    kernel: SortKernel,
    table: PolicyTable,
    counts: _Counts,
    mask: "Tensor | None",
    exclusions: "Exclusions",
) -> None:
    from adaptive_moe.tuning.inputs import ROUTINGS, route, sorting_inputs
    from adaptive_moe.tuning.rounds import check

    shape, largest = table.evidence.coverage.shape, max(max(ends) for ends in counts.values())
    for seed, routing in enumerate(ROUTINGS):
        tokens = route(shape, largest, routing, seed, kernel.device)
        for num_tokens in sorted(set().union(*counts.values())):
            candidates = [
                candidate
                for candidate in kernel.candidates[1:]
                if num_tokens in counts.get(candidate.name, ())
            ]
            inputs = [sorting_inputs(shape, tokens, num_tokens, mask)]
            check([kernel.baseline, *candidates], inputs, num_tokens, exclusions)
