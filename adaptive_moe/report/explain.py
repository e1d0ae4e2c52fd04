"""Why one token count gets what it gets, in lines of text."""

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import Choice
from adaptive_moe.report.words import candidate_words, judgement_words


def explain(table: PolicyTable, num_tokens: int, *, captured: bool) -> list[str]:
    """Why a batch of num_tokens gets what it gets, from the measured count that speaks for it."""
    evidence = table.evidence
    situation = Situation.GRAPH if captured else Situation.EAGER
    name = table.candidate(num_tokens, captured=captured)
    kind = "captured into a graph" if captured else "eager"
    lines = [f"{num_tokens} tokens, {kind}: {candidate_words(name)}"]
    choice = table.choice_at(num_tokens, situation)
    if choice is None:
        lines.append("  nothing was measured for so many tokens, so the baseline serves")
    else:
        lines += _choice_lines(table, choice, num_tokens, name)
    if not is_for(table, num_tokens):
        lines.append("  this table is not for so many tokens: another one may be")
    rule = evidence.rule
    lines.append(
        f"  {evidence.kernel} on {evidence.environment.device}, torch "
        f"{evidence.environment.torch}, {evidence.created}; the baseline stays unless surely "
        f"{rule.margin:.1%} is saved, at a confidence of {rule.confidence:.0%}"
    )
    return lines


def is_for(table: PolicyTable, num_tokens: int) -> bool:
    """Is that count among those the table was made for?"""
    coverage = table.evidence.coverage
    return any(num_tokens in coverage.counts(situation) for situation in Situation)


def _choice_lines(table: PolicyTable, choice: Choice, num_tokens: int, name: str) -> list[str]:
    count = choice.num_tokens
    next_up = "" if num_tokens == count else ", the next measured count up"
    lines = [f"  measured at {count} tokens{next_up}"]
    if name != choice.candidate:
        lines.append(
            f"  there {candidate_words(choice.candidate)} is chosen, but not at the measured count "
            "below: what lies between gets what may serve at both"
        )
    confidence = table.evidence.rule.confidence
    for view in choice.verdicts:
        if len(choice.verdicts) > 1:
            part = f", {100 * view.fraction:.3g}% of the rows real" if view.fraction < 1.0 else ""
            lines.append(f"  {'time of the host' if view.on_host else 'time of the device'}{part}")
        lines += [f"    {judgement_words(view, j, confidence)}" for j in view.judgements]
    if any(view.on_host for view in choice.verdicts):
        lines.append(
            f"  below {table.evidence.coverage.busy_from} tokens the device or the host may bound "
            "an eager step: chosen is only what saves more of one than it may cost of the other"
        )
    return lines
