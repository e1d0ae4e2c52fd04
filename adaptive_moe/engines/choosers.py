"""vLLM's int4 layers with FlyDSL (gfx950): they pick block_size by token count from a JSON of their
own, and reach AITER's sort without asking AITER for it.

Read in `fused_flydsl_moe` of vLLM 0.27.1 and 0.33.0.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

from adaptive_moe.engines.coverage import Piece
from adaptive_moe.engines.hook import SeenCall
from adaptive_moe.kernels.aiter import SortRequest

CONFIG = "try_get_optimal_config"
SNAP = "_snap_flydsl_int4_tiles"
TILES = ("tile_m", "tile_n", "tile_k", "tile_n2", "tile_k2")


class Int4Chooser:
    """Notes how the layers ask for their configuration, just before they sort, and answers for
    other token counts as they would."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        # By (num_experts, inter_dim): token count -> tiles, of which the nearest count's are used.
        self.asked: dict[tuple[int, int], dict[int, dict[str, int]]] = {}
        original = getattr(module, CONFIG)

        @functools.wraps(original)
        def try_get_optimal_config(num_experts: Any, inter_dim: Any) -> Any:
            found = original(num_experts, inter_dim)
            self.asked[num_experts, inter_dim] = found
            return found

        setattr(module, CONFIG, try_get_optimal_config)

    def __call__(self, seen: SeenCall, last: int) -> Sequence[Piece] | None:
        """The pieces of the configuration that explains the block_size that was seen."""
        for (num_experts, _), config in self.asked.items():
            pieces = self._pieces(config, last)
            here = next(p for p in pieces if p.last >= min(seen.num_tokens, last))
            if num_experts == seen.key.num_experts and _fits(seen, here):
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
        snap = getattr(self.module, SNAP, None)
        return int(snap(*(tiles[t] for t in TILES))[0] if snap else tiles["tile_m"])


def _fits(seen: SeenCall, piece: Piece) -> bool:
    key = seen.key
    plain = not (key.has_expert_mask or key.has_num_local_tokens)
    return plain and key.block_size == piece.request.block_size
