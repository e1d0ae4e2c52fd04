"""Memory for one sort in which every wrong bit shows, compared on the device without waiting.

`Memory` lends its poisoned words to whoever calls torch.empty, torch.empty_strided (for what is
contiguous) or a tensor's new_empty: the five results first, each with a guard behind its end, so
that neither what is left unwritten nor what is written outside goes unseen. `expected` says by
torch's own stable sort what is to stand in them.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = 0xE19F  # poison is no valid output, and not zero, in any dtype
POISON = (HALF << 16 | HALF) - (1 << 32)
GUARD = 1024  # words behind each buffer's end, or some more
ALIGNED = 64  # words, as torch.empty's memory is: kernels are compiled for that
PARTS = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids")


@dataclass(frozen=True)
class Grouped:
    """Entries in order of their expert, which is that of every block size."""

    key: Tensor
    order: Tensor
    weights: Tensor
    counts: Tensor
    local: Tensor
    rows: Tensor
    topk: int


def grouped(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    expert_mask: Tensor | None,
    num_local_tokens: Tensor | None,
) -> Grouped:
    """The contract by torch's stable sort, on the inputs' device and without waiting for it."""
    num_tokens, topk = topk_ids.shape
    device = topk_ids.device
    if num_local_tokens is None:
        rows = torch.full((1,), num_tokens, device=device)
    else:
        rows = num_local_tokens.long()
    visible = torch.ones(num_experts, dtype=torch.bool, device=device)
    if expert_mask is not None:
        visible = expert_mask != 0
    key = topk_ids.flatten().long()
    is_expert = (key >= 0) & (key < num_experts)
    is_expert &= torch.arange(len(key), device=device) < rows * topk
    is_expert &= visible[key.clamp(0, num_experts - 1)]
    key, order = torch.where(is_expert, key, num_experts).sort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    local = (visible.long().cumsum(0) - 1).int()
    return Grouped(key, order, topk_weights.flatten()[order], counts, local, rows, topk)


@dataclass(frozen=True)
class Expected:
    """The first four results as 32-bit words, and where each is defined; of the shorter length."""

    words: tuple[Tensor, ...]
    defined: tuple[Tensor, ...]


def expected(entries: Grouped, block_size: int) -> Expected:
    topk, key, order, counts = entries.topk, entries.key, entries.order, entries.counts
    device, experts = key.device, len(counts) - 1
    length = len(key) + experts * block_size - topk
    padded = (counts[:-1] + block_size - 1) // block_size * block_size
    ends = padded.cumsum(0)
    starts = torch.cat([ends - padded, ends[:1] * 0 + length])
    shift = starts - (counts.cumsum(0) - counts)
    # Entries of no expert all land on one place past the end, which is cut off.
    place = torch.arange(len(key), device=device)
    target = torch.where(key < experts, shift[key] + place, length)
    ids = ((topk << 24) | entries.rows).int().repeat(length + 1)
    ids[target] = (((order % topk) << 24) | (order // topk)).int()
    weights = torch.zeros(length + 1, device=device)
    weights[target] = entries.weights
    real = torch.zeros(length + 1, dtype=torch.bool, device=device).scatter_(0, target, True)
    place = torch.arange(length, device=device)
    block_start = torch.arange(0, length, block_size, device=device)
    expert = torch.searchsorted(ends, block_start, right=True).clamp(max=experts - 1)
    valid = torch.cat([ends[-1:], entries.rows]).int()
    return Expected(
        (ids[:-1], weights[:-1].view(torch.int32), entries.local[expert], valid),
        (place < ends[-1], real[:-1], block_start < ends[-1], valid >= 0),
    )


@contextmanager
def guarded_memory(
    poison: int, guard: int, outputs: Iterable[Tensor] = ()
) -> Iterator[list[Tensor]]:
    """Within it torch.empty, torch.empty_strided and a tensor's new_empty give poison, with a guard
    of poison behind it; yields the guards.

    outputs: what the next calls get instead, in that order, where shape and dtype are theirs.
    """
    real_empty, real_strided, real_new = torch.empty, torch.empty_strided, Tensor.new_empty
    place, guards = iter(outputs), []

    def empty(*size: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        shape = size[0] if isinstance(size[0], tuple) else size
        output = next(place, None)
        if output is not None and output.shape == shape and output.dtype == dtype:
            return output
        count = math.prod(shape)
        buffer = torch.full((count + guard,), poison, dtype=dtype, device=device)
        guards.append(buffer[count:])
        return buffer[:count].view(shape)

    def empty_strided(size: tuple[int, int], stride: tuple[int, int], **options: Any) -> Tensor:
        assert stride == (size[1], 1)
        return empty(size, **options)

    def new_empty(tensor: Tensor, size: int, **options: Any) -> Tensor:
        if options:  # Triton's interpreter
            return real_new(tensor, size, **options)
        return empty(size, dtype=tensor.dtype, device=tensor.device)

    torch.empty, torch.empty_strided, Tensor.new_empty = empty, empty_strided, new_empty
    try:
        yield guards
    finally:
        torch.empty, torch.empty_strided, Tensor.new_empty = (
            real_empty, real_strided, real_new
        )  # fmt: skip


class Memory:
    """What one sort allocates: moe_buf first and the four compared results after it, in one piece.

    length: of sorted_ids and sorted_weights.
    """

    def __init__(
        self, length: int, block_size: int, shape: tuple[int, int], dtype: torch.dtype, device: Any
    ) -> None:
        self.sizes = (length, length, math.ceil(length / block_size), 2)
        self.bytes = math.prod(shape) * dtype.itemsize
        self.start = self.bytes // 4  # from here on every word is compared or undefined
        self.offsets, at = [], 0
        for size in (-(-self.bytes // 4), *self.sizes):
            self.offsets.append(at)
            at = -(-(at + size + GUARD) // ALIGNED) * ALIGNED
        del self.offsets[0]  # that of moe_buf
        self.words = torch.empty(at, dtype=torch.int32, device=device)
        dtypes = (torch.int32, torch.float32, torch.int32, torch.int32)
        self.outputs = [
            self.words[at : at + size].view(one)
            for at, size, one in zip(self.offsets, self.sizes, dtypes, strict=False)
        ]
        end = -(-self.bytes // 4)
        self.outputs.append(self.words[:end].view(dtype)[: math.prod(shape)].view(shape))
        self.places = [(o.data_ptr(), o.shape, o.dtype) for o in self.outputs]

    def wanted(self, right: Expected) -> tuple[Tensor, Tensor]:
        """The compared words, and a mask of those that are defined. Guards are."""
        words = self.words.new_full((len(self.words) - self.start,), POISON)
        defined = torch.full_like(words, -1)
        if self.bytes % 4:  # half a word of moe_buf, compared by itself, and half of its guard
            defined[0] = -1 << 16
        for at, size, some, where in zip(
            self.offsets, self.sizes, right.words, right.defined, strict=False
        ):
            first = at - self.start
            words[first : first + len(some)] = some
            defined[first : first + size] = 0
            defined[first : first + len(some)] = -where.int()
        return words, defined

    @contextmanager
    def lent(self) -> Iterator[list[Tensor]]:
        """Within it an allocation gives poison; yields the guards of what a sort has besides."""
        self.words.fill_(POISON)
        with guarded_memory(POISON, GUARD, self.outputs) as guards:
            yield guards

    def differs(
        self,
        right: tuple[Tensor, Tensor],
        outputs: Any,
        guards: list[Tensor],
        flags: Tensor,
        rows: int,
    ) -> bool:
        """Whether the results lie elsewhere; into `flags`, bool [3] on the device, goes whether a
        compared word, moe_buf in its first `rows`, or a guard of the workspace differs. The words
        are used up."""
        words, defined = right
        torch.any(self.outputs[4][:rows].view(-1), dim=0, out=flags[1])
        compared = self.words[self.start :]
        compared.bitwise_xor_(words).bitwise_and_(defined)
        torch.any(compared, dim=0, out=flags[0])
        for guard in guards:
            flags[2] |= (guard != POISON).any()
        places = [(o.data_ptr(), o.shape, o.dtype) for o in outputs]
        return places != self.places

    def names(self, flags: Tensor, elsewhere: bool) -> list[str]:
        """What differs, in words, once `differs` has run. Waits for the device."""
        compared = self.words[self.start :]
        found, guards = [], torch.ones(len(compared), dtype=torch.bool, device=compared.device)
        for name, at, size in zip(PARTS, self.offsets, self.sizes, strict=True):
            part = slice(at - self.start, at - self.start + size)
            guards[part] = False
            if bool(compared[part].any()):
                found.append(name)
        others = (bool(compared[guards].any()), bool(flags[1]), bool(flags[2]), elsewhere)
        words = ("guard", "moe_buf", "workspace guard", "length or place")
        return found + [name for name, wrong in zip(words, others, strict=True) if wrong]
