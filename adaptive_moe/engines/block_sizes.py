"""Which block_size a layer comes with at each token count. A forward shows few counts, and another
block_size is another table: so the chooser that picked the one that was seen is asked about the
other counts."""

import functools
import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels.aiter import CHOOSER, MODULE, SortRequest, request_at, run_without_exit
from adaptive_moe.kernels.call import CallKey, SortCall

logger = logging.getLogger("adaptive_moe")


@dataclass(frozen=True)
class Piece:
    """Token counts first to last, inclusive, that are sorted alike."""

    first: int
    last: int
    request: SortRequest


# Divides 1 to `last` into pieces, rising and without gaps, as the layer of that call picks its
# block_size; None where it does not pick the layer's.
Chooser = Callable[[SortCall, int], "Sequence[Piece] | None"]


def pieces_of(seen: SortCall, last: int, choosers: Sequence[Chooser]) -> Sequence[Piece]:
    """1 to `last` as the layer's own chooser divides it: the one that explains what was seen. Where
    none does, only what was seen is known: a count with another block_size runs the baseline."""
    for choose in choosers:
        try:
            pieces = run_without_exit(functools.partial(choose, seen, last)) or ()
        # A chooser is the engine's or AITER's code, and may raise anything.
        except Exception as error:
            logger.debug("block sizes at other token counts are not known: %r", error)
            continue
        here = [p for p in pieces if p.first <= seen.num_tokens <= p.last]
        if here and here[0].request.sorts and key_at(seen, here[0]) == seen.key:
            return pieces
    return (Piece(1, last, SortRequest(seen.key.block_size, seen.key.accumulate, sorts=True)),)


def key_at(seen: SortCall, piece: Piece) -> CallKey:
    """What the layer of that call comes with at the counts of a piece."""
    accumulate = piece.request.accumulate or seen.key.has_expert_mask
    return seen.key._replace(block_size=piece.request.block_size, accumulate=accumulate)


def aiters_choosers(hook: AiterHook) -> list[Chooser]:
    """AITER's chooser, asked by the function that it asks itself, in the words that were used.

    It is asked once for each class of counts that it tells apart, which get_padded_M names. Also
    where our layer stood aside: this rank must name its tables as the others do.
    """
    wrapped = hook.wrapped
    module: ModuleType | None = sys.modules.get(MODULE) if wrapped is None else wrapped.module
    asked = getattr(module, CHOOSER, None) if wrapped is None else wrapped.chooser
    pad = getattr(module, "get_padded_M", None)
    # With online tuning on, asking about a new count would start AITER's own tuner, for minutes.
    tunes_online = os.environ.get("AITER_ONLINE_TUNE", "0") == "1"
    if module is None or asked is None or pad is None or tunes_online:
        return []

    def choose(seen: SortCall, last: int) -> list[Piece] | None:
        if seen.config is None:
            return None
        pieces = []
        first = 1
        while first <= last:
            end = first + bisect_right(range(first, last + 1), pad(first), key=pad) - 1
            request = seen.as_called(request_at, module, asked, seen.config, first)
            pieces.append(Piece(first, end, request))
            first = end + 1
        return pieces

    return [choose]


class VllmInt4:
    """vLLM's int4 layers with FlyDSL (gfx950): they pick block_size from a JSON of vLLM's, and
    reach AITER's sort without asking AITER for it.

    Notes how the layers ask for their configuration, just before they sort, and answers for other
    token counts as they would. Read in `fused_flydsl_moe` of vLLM 0.27.1 and 0.33.0.
    """

    CONFIG = "try_get_optimal_config"
    SNAP = "_snap_flydsl_int4_tiles"
    TILES = ("tile_m", "tile_n", "tile_k", "tile_n2", "tile_k2")

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        # By (num_experts, inter_dim): token count -> tiles, of which the nearest count's are used.
        self.asked: dict[tuple[int, int], dict[int, dict[str, int]]] = {}
        original = getattr(module, self.CONFIG)

        @functools.wraps(original)
        def try_get_optimal_config(num_experts: Any, inter_dim: Any) -> Any:
            found = original(num_experts, inter_dim)
            self.asked[num_experts, inter_dim] = found
            return found

        setattr(module, self.CONFIG, try_get_optimal_config)

    def __call__(self, seen: SortCall, last: int) -> Sequence[Piece] | None:
        """The pieces of the configuration that explains the block_size that was seen."""
        key = seen.key
        if key.has_expert_mask or key.has_num_local_tokens:
            return None
        for (num_experts, _), config in self.asked.items():
            pieces = self._pieces(config, last)
            here = next(p for p in pieces if p.last >= min(seen.num_tokens, last))
            if (num_experts, here.request.block_size) == (key.num_experts, key.block_size):
                return pieces
        return None

    def _pieces(self, config: dict[int, dict[str, int]], last: int) -> list[Piece]:
        counts = sorted(config)
        # Halfway between two, the smaller one is taken.
        ends = [min((a + b) // 2, last) for a, b in pairwise(counts)] + [last]
        pieces, first = [], 1
        for count, end in zip(counts, ends, strict=True):
            if end >= first:
                request = SortRequest(self._block_size(config[count]), accumulate=True, sorts=True)
                pieces.append(Piece(first, end, request))
                first = end + 1
        return pieces

    def _block_size(self, tiles: dict[str, int]) -> int:
        snap = getattr(self.module, self.SNAP, None)
        return int(snap(*(tiles[t] for t in self.TILES))[0] if snap else tiles["tile_m"])
