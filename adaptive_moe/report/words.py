"""The words of reports: what candidates, models and situations are called, and how numbers are
written.

Logs, the command line, plots and the page all take them from here.
"""

from collections.abc import Iterator, Sequence

from adaptive_moe.models import title_of
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import Evidence
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import Choice, Judgement, Standing, Verdict

# What a candidate's name does not say by itself.
_MEANINGS = {
    "policy 0": "AITER's rule",
    "policy 1": "one-shot",
    "policy 2": "multi-phase",
    # What became of a 0 and a 2 where AITER's schema made a bool of it.
    "policy False": "AITER's rule",
    "policy True": "one-shot",
}
_SITUATIONS = {Situation.GRAPH: "captured", Situation.EAGER: "eager"}
_STANDINGS = {
    Standing.UNSETTLED: "not settled",
    Standing.UNCONFIRMED: "not confirmed yet",
    Standing.DROPPED: "far slower",
}
# Of a candidate whose gain is open in a count that is settled even so.
NO_MORE = "not worth more rounds"
# The kernel that every machine has and no engine uses.
CPU_KERNEL = "cpu"
TUNES_NOTHING = "measured on the CPU sort, which no engine uses: it shows the method, tunes nothing"


def candidate_words(name: str) -> str:
    """Such as `policy 1 (one-shot)`; other sorts' names speak for themselves."""
    meaning = _MEANINGS.get(name)
    return f"{name} ({meaning})" if meaning else name


def title_words(coverage: Coverage) -> str:
    """What a table is called: by the model where its shape is known, such as `DeepSeek-V3, block
    32`, else by the shape."""
    shape = coverage.shape
    name = title_of(shape.num_experts, shape.topk, shape.model_dim)
    name = name or f"{shape.num_experts} experts, topk {shape.topk}, dim {shape.model_dim}"
    words = [name, f"block {shape.block_size}"]
    if shape.local_experts is not None:
        words.append(f"{shape.local_experts} local experts")
    return ", ".join(words)


def calls_words(coverage: Coverage) -> str:
    """What a table is for, such as `8 experts, ..., block 64, 33 to 2048 tokens`. Where AITER picks
    the block size by token count, each table is for some of them only."""
    spans = ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in coverage.eager)
    if coverage.eager == ((1, coverage.max_tokens),):
        spans = f"up to {coverage.max_tokens}"
    return f"{coverage.describe()}, {spans} tokens"


def where_words(evidence: Evidence) -> str:
    """What was measured on what, such as `aiter 0.1.22 opus, 0123, on AMD Instinct MI300X`."""
    return f"{evidence.kernel}, on {evidence.environment.device}"


def measured_situations(table: PolicyTable) -> Iterator[Situation]:
    """The situations that were measured, in the order they are read."""
    return (situation for situation in Situation if table.choices(situation))


def situation_words(situation: Situation) -> str:
    return _SITUATIONS[situation]


def span_words(spans: Sequence[tuple[int, int]]) -> str:
    """Such as `9 to 24, 64 and 725 to 1,024 tokens`; of many spans only the ends."""
    if len(spans) > 3:
        return f"{len(spans)} spans from {spans[0][0]:,} to {spans[-1][1]:,} tokens"
    words = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in spans]
    joined = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
    return f"{joined} {'token' if spans == [(1, 1)] else 'tokens'}"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100.0 * fraction:.1f}%"


def between_words(least: float, most: float) -> str:
    """Such as `3 to 12%`, or `5%` where both ends are that."""
    low, high = f"{100 * least:.0f}", f"{100 * most:.0f}"
    return f"{low}%" if low == high else f"{low} to {high}%"


def time_us(view: Verdict, candidate: str) -> float | None:
    """What a call took, in microseconds; None for what was not measured.

    The baseline's median, and of another what that is less what it saves: rounds are compared in
    pairs, and medians of a machine that changes its speed may contradict them.
    """
    judgement, base = view.judgement(candidate), view.baseline.median_us
    if judgement.median_us is None:
        return None
    paired = base * (1.0 - judgement.gain) if base and judgement.gain is not None else 0.0
    return paired or judgement.median_us


def view_label(choice: Choice, view: Verdict) -> str:
    """The count, and which of several views of it: `64`, `64 (50% real)`, `64 host`."""
    if view.on_host:
        return f"{choice.num_tokens} host"
    if len(choice.device) > 1:
        return f"{choice.num_tokens} ({100 * view.fraction:.3g}% real)"
    return str(choice.num_tokens)


def gain_words(judgement: Judgement, confidence: float) -> str:
    """Such as `saves 20.0%, 99% interval 12.0% to 24.0%` or `takes 6.2% longer, ...`."""
    gain, low, high = judgement.gain or 0.0, judgement.gain_low, judgement.gain_high
    words = "saves {}"
    if gain < 0.0:
        # The other way round, so that both words and both ends are of positive numbers.
        words, gain = "takes {} longer", -gain
        low, high = (None if end is None else -end for end in (high, low))
    if low is None or high is None:
        sure = "too few rounds for an interval"
    else:
        sure = f"{confidence:.0%} interval {percent(low)} to {percent(high)}"
    return f"{words.format(percent(gain))}, {sure}"


def standing_words(judgement: Judgement) -> str:
    """Such as `tied`; `not measured` for what has no time at all."""
    standing = judgement.standing
    if standing is Standing.UNSETTLED and judgement.median_us is None:
        return "not measured"
    return _STANDINGS.get(standing, standing.value)


def verdict_words(choice: Choice, view: Verdict, confidence: float) -> str:
    """Why the count gets what it gets, as far as this view of it goes."""
    if not choice.was_measured:
        return "not measured, no time was left"
    baseline, *judged = view.judgements
    if choice.candidate != baseline.candidate:
        judged = [view.judgement(choice.candidate)]
    open_word = NO_MORE if choice.settled else ""
    said = [_short_words(judgement, confidence, open_word) for judgement in judged]
    return "; ".join(said) or "it is the only candidate"


def judgement_words(view: Verdict, judgement: Judgement, confidence: float) -> str:
    """One candidate of one view: its standing, its time, and what it saves."""
    line = f"{candidate_words(judgement.candidate)}: {standing_words(judgement)}"
    if (took := time_us(view, judgement.candidate)) is not None:
        line += f", {took:.1f} us"
    if judgement.gain is not None and judgement.standing is not Standing.BASELINE:
        line += f", {gain_words(judgement, confidence)}"
    return line + (f": {judgement.reason}" if judgement.reason else "")


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short_words(judgement: Judgement, confidence: float, open_word: str) -> str:
    """open_word: in place of `not settled` and the like, where it may stay so."""
    name, standing = judgement.candidate, judgement.standing
    if standing is Standing.FASTER:
        return f"{name} {gain_words(judgement, confidence)}"
    if standing in (Standing.UNSETTLED, Standing.UNCONFIRMED) and judgement.gain is not None:
        return (
            f"{name} {gain_words(judgement, confidence)}: {open_word or standing_words(judgement)}"
        )
    reason = f" ({judgement.reason})" if judgement.reason else ""
    return f"{name} {standing_words(judgement)}{reason}"
