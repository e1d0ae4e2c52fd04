"""What a layer runs with, by token count and quantisation: a few of AITER's cases, made small."""

from dataclasses import dataclass

from aiter import QuantType

BLOCK_SIZE_M = 32

# What the sort writes besides, for one kind of GEMM: a bool at first, later one of these.
AUX_SORT_NONE = ""
AUX_SORT_OPUS = "opus"


@dataclass
class MOEMetadata:
    stage1: object
    stage2: object
    block_m: int
    ksplit: int = 0
    flat: bool = False
    output_aux: bool | str = AUX_SORT_NONE


def get_padded_M(M):  # noqa: N802, N803
    if M >= 32768:
        return 131072 if M >= 131072 else 32768
    return 1 if M <= 1 else 1 << (M - 1).bit_length()


def choose(token, q_type):
    """Small batches get small blocks; a quantised layer reduces by itself when they are large."""
    if q_type == QuantType.per_1x128:
        return MOEMetadata(None, "atomic", 64 if token > 32 else 16)
    if q_type == QuantType.per_1x32:
        return MOEMetadata(None, "reduce" if token > 256 else "atomic", 32)
    if q_type == QuantType.per_Token:
        return MOEMetadata(None, None, 32, flat=token > 64)
    if q_type == QuantType.per_Tensor:
        aux = AUX_SORT_OPUS if token > 64 else AUX_SORT_NONE
        return MOEMetadata(None, "atomic", 64, output_aux=aux)
    return MOEMetadata(None, "atomic", BLOCK_SIZE_M)
