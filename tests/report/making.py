"""Tables with something of all that people are shown."""

from dataclasses import replace

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.evidence import Exclusion
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from tests.tables import ENVIRONMENT, bucket, make_evidence, result

ZERO, ONE, TWO = "policy 0", "policy 1", "policy 2"
DEEPSEEK = {"num_experts": 256, "topk": 8, "model_dim": 7168}


def tied(count):
    return bucket(count, [result(ZERO, 0.0), result(ONE, 0.0), result(TWO, -1.2)])


def faster(count, gain=0.2):
    """policy 1 surely saves so much; policy 2 was dropped."""
    others = [result(ONE, gain, second=gain), result(TWO, -8.0, dropped=9.0)]
    return bucket(count, [result(ZERO, 0.0), *others])


def open_still(count, gain=0.059, noise=0.1):
    others = [result(ONE, gain, noise=noise), result(TWO, -0.2)]
    return bucket(count, [result(ZERO, 0.0), *others])


def unmeasured(count):
    return bucket(count, [result(name) for name in (ZERO, ONE, TWO)])


def table_of(eager, graph=(), **fields):
    return PolicyTable(make_evidence(eager, graph, **fields))


def everything() -> PolicyTable:
    """Captured and eager calls that get different sorts; counts that are tied, won, open, not
    measured; a candidate dropped, and a loss beyond the edge of the plot."""
    eager = [tied(1), faster(24, 0.25), open_still(64), unmeasured(512), tied(4096)]
    graph = [tied(1), faster(8, 0.12), faster(16, 0.03), open_still(24)]
    device = replace(ENVIRONMENT, device="AMD Instinct MI300X")
    return table_of(eager, graph, **DEEPSEEK, environment=device, seconds=1.234)


def with_host() -> PolicyTable:
    """Eager calls below busy_from, whose host time counts as well: policy 1 wins by it alone."""
    counts = [
        bucket(n, [result(ZERO, 0.0, host=0.0), result(ONE, 0.0, host=0.3)]) for n in (1, 8, 64)
    ]
    coverage = Coverage(SortingShape(16, 4, 64), ZERO, ((1, 64),), busy_from=2048)
    return table_of(counts, coverage=coverage)


def failed() -> PolicyTable:
    exclusions = (Exclusion(ONE, wrong=False, reason="raised ValueError: <none>"),)
    return table_of([tied(8)], excluded=exclusions, kernel="another & kernel")
