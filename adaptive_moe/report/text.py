"""Tables in lines of text: the one line of a start, a table's result, its counts, what to do where
much is open.

Logs and commands take their lines from here; the words are those of words.py.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.savings import savings
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import Choice, Standing
from adaptive_moe.report.words import (
    CPU_KERNEL,
    TUNES_NOTHING,
    between_words,
    calls_words,
    candidate_words,
    measured_situations,
    percent,
    plural,
    situation_words,
    span_words,
    time_us,
    title_words,
    verdict_words,
    view_label,
    where_words,
)

# From this share of open counts on, a reader is told what to do about it.
MANY_OPEN = 0.25
# Columns of the one line of a start.
MOST_COLUMNS = 120
UNSETTLED, UNMEASURED = "not settled", "not measured"


def start_line(tables: Sequence[PolicyTable], *, continues: bool = True) -> str:
    """The one line of a start that chose by these tables, made for grep.

    continues: will the next start measure what is open? Such as `adaptive_moe: on, 2 shapes,
    captured calls save 3 to 12% of the sort at 14 of 51 counts; details below`.
    """
    if not tables:
        return "adaptive_moe: no table, so nothing changes; the warnings above say why"
    counts = sum(savings(t, s).counts for t in tables for s in Situation)
    open_counts = sum(table.open_counts for table in tables)
    left = f"{open_counts} of {plural(counts, 'count')} unsettled"
    gains = [words for situation in Situation if (words := _gains_of(tables, situation))]
    if not gains:
        if not open_counts:
            return f"adaptive_moe: no gain found at {plural(counts, 'count')}, all settled"
        then = "the next start continues" if continues else "more rounds promise little"
        return f"adaptive_moe: no gain found; {left}, {then}"
    head = f"adaptive_moe: on, {plural(len(tables), 'shape')}"
    for more in (gains, gains[:1]):
        line = f"{head}, {', '.join(more)}; details below"
        if len(line) <= MOST_COLUMNS:
            break
    return line


def fixed_line(policy: int, variable: str) -> str:
    """The one line of a start with a fixed policy; variable: which asked for it, with its value."""
    return f"adaptive_moe: policy {policy} for every call ({variable})"


def result_line(table: PolicyTable) -> str:
    """What came out of it, in one sentence, such as `DeepSeek-V3, block 32, on AMD Instinct MI300X:
    captured calls, up to 12% off the sort at 9 to 24 tokens; the baseline elsewhere`."""
    evidence = table.evidence
    gained = [
        words for situation in measured_situations(table) if (words := _off(table, situation))
    ]
    if gained:
        said = f"{'; '.join(gained)}; the baseline elsewhere"
        if all(_is_everywhere(table, situation) for situation in measured_situations(table)):
            said = "; ".join(gained)
    else:
        said = f"no gain found, the baseline everywhere{_open_words(table)}"
    return f"{title_words(evidence.coverage)}, on {evidence.environment.device}: {said}"


def table_lines(
    table: PolicyTable, *, measured_now: bool = True, with_counts: bool = True
) -> list[str]:
    """A table as a log has it: its result first; beneath what it is for, what sorts, why the
    baseline was kept, where and when it was measured; and with_counts a line for each count."""
    evidence = table.evidence
    when = f"in {evidence.seconds:.2f} s" if measured_now else f"at {evidence.created}"
    lines = [
        result_line(table),
        f"  {calls_words(evidence.coverage)}",
        f"  baseline {candidate_words(evidence.coverage.baseline)}; "
        f"{where_words(evidence)}; measured {when}",
        *(f"  {situation_words(s)}: {_sorted_by(table, s)}" for s in measured_situations(table)),
    ]
    if why := kept_words(table):
        lines.append(f"  the baseline stays at {why}")
    if evidence.kernel == CPU_KERNEL:
        lines.append(f"  {TUNES_NOTHING}")
    return [*lines, *(bucket_table(table) if with_counts else ())]


def settled_words(table: PolicyTable) -> str:
    """Such as `12 of 14 counts settled`, with how many starts it took."""
    counts = sum(len(table.choices(situation)) for situation in Situation)
    starts = plural(table.evidence.starts, "start")
    return f"{counts - table.open_counts} of {plural(counts, 'count')} settled in {starts}"


def kept_words(table: PolicyTable) -> str:
    """How many counts stay with the baseline, by why, such as `3 counts tied`."""
    return ", ".join(f"{plural(n, 'count')} {why}" for why, n in sorted(_kept(table).items()))


def bucket_table(table: PolicyTable) -> list[str]:
    """The evidence as aligned lines, a block a situation: us of each candidate (empty where nothing
    was measured), what the winner saves, rounds, and the verdict in words."""
    lines: list[str] = []
    situations = list(measured_situations(table))
    for situation in situations:
        if len(situations) > 1:
            lines.append(situation_words(situation))
        lines += _aligned([bucket_heads(table), *bucket_rows(table, situation)])
    return lines


def bucket_heads(table: PolicyTable) -> list[str]:
    """The columns of `bucket_rows`."""
    names = table.evidence.candidates
    return ["tokens", *(f"{name} us" for name in names), "saves", "rounds", "verdict"]


def bucket_rows(table: PolicyTable, situation: Situation) -> Iterator[list[str]]:
    """A row of cells for each measured count, or for each view of it where it has several."""
    evidence = table.evidence
    for choice in table.choices(situation):
        for view in choice.verdicts:
            took = [time_us(view, name) for name in evidence.candidates]
            times = ["" if us is None else f"{us:.1f}" for us in took]
            is_kept = choice.candidate == choice.baseline
            saves = "" if is_kept else percent(view.judgement(choice.candidate).gain)
            words = verdict_words(choice, view, evidence.rule.confidence)
            yield [view_label(choice, view), *times, saves, str(view.rounds or ""), words]


def advice(table: PolicyTable) -> list[str]:
    """What to do where much was left open; nothing where little was."""
    evidence, why = table.evidence, _kept(table)
    counts = sum(len(table.choices(situation)) for situation in Situation)
    open_still = [f"{why[word]} {word}" for word in (UNSETTLED, UNMEASURED) if why[word]]
    if why[UNSETTLED] + why[UNMEASURED] < MANY_OPEN * counts:
        return []
    # One that ended before its budget did had nothing left that promised enough.
    more = ""
    if evidence.seconds >= evidence.budget_s:
        more = f", or give more time, such as {4 * evidence.budget_s:g} s "
        more += "(--budget, ADAPTIVE_MOE_BUDGET_S)"
    return [
        f"{' and '.join(open_still)} of {plural(counts, 'count')}: times varied too much to tell a "
        "gain from noise, so these stay with the baseline.",
        f"Other work on this machine is the usual cause: calibrate again when it is quiet{more}. "
        "What is settled is not measured again.",
    ]


def changed_spans(table: PolicyTable, situation: Situation) -> list[tuple[int, int]]:
    """First and last of the token counts in a row that get another candidate than the baseline."""
    spans: list[tuple[int, int]] = []
    extends = False
    for first, last, name in table.runs(captured=situation is Situation.GRAPH):
        changed = name != table.evidence.coverage.baseline
        if changed and extends:
            spans[-1] = (spans[-1][0], last)
        elif changed:
            spans.append((first, last))
        extends = changed
    return spans


def _gains_of(tables: Sequence[PolicyTable], situation: Situation) -> str:
    """Such as `captured calls save 3 to 12% of the sort at 14 of 51 counts`, or nothing."""
    each = [savings(table, situation) for table in tables]
    gains = [(saved.least, saved.most) for saved in each if saved.least is not None]
    if not gains:
        return ""
    least = min(low for low, _ in gains if low is not None)
    most = max(high for _, high in gains if high is not None)
    improved, counts = (sum(getattr(s, n) for s in each) for n in ("improved", "counts"))
    return (
        f"{situation_words(situation)} calls save {between_words(least, most)} of the sort at "
        f"{improved} of {counts} counts"
    )


def _off(table: PolicyTable, situation: Situation) -> str:
    """Such as `captured calls, up to 12% off the sort at 9 to 24 tokens`; nothing without a gain:
    between two measured counts it may be less than at either."""
    saved, spans = savings(table, situation), changed_spans(table, situation)
    if saved.most is None or not spans:
        return ""
    gain = f"up to {100 * saved.most:.0f}% off the sort"
    return f"{situation_words(situation)} calls, {gain} at {span_words(spans)}"


def _is_everywhere(table: PolicyTable, situation: Situation) -> bool:
    runs = table.runs(captured=situation is Situation.GRAPH)
    return all(name != table.evidence.coverage.baseline for _, _, name in runs)


def _open_words(table: PolicyTable) -> str:
    counts = sum(len(table.choices(situation)) for situation in Situation)
    return f"; {table.open_counts} of {counts} counts not settled" if table.open_counts else ""


def _sorted_by(table: PolicyTable, situation: Situation) -> str:
    """Such as `policy 1 (one-shot) 2 to 24, else policy 0 (AITER's rule)`."""
    runs = table.runs(captured=situation is Situation.GRAPH)
    baseline = table.evidence.coverage.baseline
    if len(runs) == 1:
        return f"{candidate_words(runs[0][2])} at every count"
    pieces = []
    for name in dict.fromkeys(name for *_, name in runs if name != baseline):
        spans = [(first, last) for first, last, sort in runs if sort == name]
        words = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]
        pieces.append(f"{candidate_words(name)} at {', '.join(words)}")
    if any(name == baseline for *_, name in runs):
        pieces.append(f"else {candidate_words(baseline)}")
    return "; ".join(pieces)


def _kept(table: PolicyTable) -> Counter[str]:
    """How many counts stay with the baseline, by why."""
    choices = [choice for situation in Situation for choice in table.choices(situation)]
    return Counter(_why_kept(choice) for choice in choices if choice.candidate == choice.baseline)


def _why_kept(choice: Choice) -> str:
    judgements = [j for view in choice.verdicts for j in view.judgements]
    failed = {
        j.candidate: j.standing
        for j in judgements
        if j.standing in (Standing.WRONG, Standing.FAILED)
    }
    if failed:
        return "where " + ", ".join(
            f"{name} {'failed' if standing is Standing.FAILED else 'was wrong'}"
            for name, standing in failed.items()
        )
    if not choice.was_measured:
        return UNMEASURED
    if not choice.settled:
        return UNSETTLED
    tied = any(j.standing is Standing.TIED for j in judgements)
    return "tied" if tied else "where it is fastest"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """All cells but the last right-aligned in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([*(c.rjust(w) for c, w in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in rows
    ]
