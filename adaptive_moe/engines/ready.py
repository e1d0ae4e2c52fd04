"""Other sorts than AITER's policies compile when they are first called. That must not happen while
a graph is captured, nor in a served batch; and a table that was stored or agreed has called nobody
here."""

import logging

from adaptive_moe.engines.own import Own
from adaptive_moe.kernels import Candidate
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable

logger = logging.getLogger("adaptive_moe")


def make_ready(own: Own, table: PolicyTable) -> None:
    """Call each other sort once wherever the table was measured or captured and chooses it, as the
    seen call was made. One that raises is left to the hook: the baseline answers in its place."""
    names = {c.name: c for c in own.kernel.candidates if not c.name.startswith("policy ")}
    calls = [(names[name], count) for name, count in _chosen(table) if name in names]
    if not calls:
        return
    try:
        own.wanted.seen.as_called(_call_each, own, calls)
    except Exception as error:
        logger.debug("not every sort was called before it serves: %r", error)


def _chosen(table: PolicyTable) -> list[tuple[str, int]]:
    found = table.evidence
    counts = {(n, True) for n in found.coverage.captured}
    counts |= {(bucket.num_tokens, False) for bucket in found.section(Situation.BUSY)}
    return sorted({(table.candidate(n, captured=captured), n) for n, captured in counts})


def _call_each(own: Own, calls: list[tuple[Candidate, int]]) -> None:
    from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs

    shape, device, mask = own.wanted.coverage.shape, own.kernel.device, own.wanted.seen.expert_mask
    if mask is None:
        mask = default_mask(shape, device)
    tokens = route(shape, max(count for _, count in calls), Routing.UNIFORM, 0, device)
    for candidate, count in calls:
        candidate.bind(sorting_inputs(shape, tokens, count, mask))()
