"""A functional interpreter of the part of AMD's CDNA3/CDNA4 ISA (wave64) that the Triton sorts use.

It takes the assembly that Triton's AMD backend emits (`compiled.asm["amdgcn"]`) and runs a launch
on CPU tensors: every wave of a workgroup has 64 lanes, 256 vector registers, 104 scalar ones, a
64-bit EXEC and VCC; waves share an LDS and meet at barriers.

What is stricter than hardware: registers and LDS start as garbage; a memory access outside the
tensors of the launch is an error unless the buffer descriptor itself drops it, as it does for lanes
that Triton masks; two waves that touch the same LDS bytes between two barriers, one of them writing
(atomics among themselves excepted), are an error; an instruction that is not known is an error.
What it does not model: time, caches, waits (s_waitcnt and s_nop do nothing), other float rounding.
"""

import functools
import operator
import re
import struct
from collections import Counter, namedtuple

import numpy as np

U32, I32, U64, I64, F32 = np.uint32, np.int32, np.uint64, np.int64, np.float32
LANES = np.arange(64)
FULL = (1 << 64) - 1
VCC, EXEC = 106, 126


class Fault(Exception):  # noqa: N818
    """The program did what it must not, or what this interpreter does not know."""


@functools.lru_cache(50_000)
def lanes_of(mask: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(struct.pack("<Q", mask), np.uint8), bitorder="little")
    return bits.astype(bool)


def mask_of(lanes: np.ndarray) -> int:
    if lanes.ndim == 0:  # one answer for all lanes
        return FULL if lanes else 0
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value * 2 >> bits else value


# --- memory ----------------------------------------------------------------------------------


def cells_of(tensors, addresses: np.ndarray, size: int, what: str):
    """The bytes of the tensor at these addresses, and which of them are the `size` at each."""
    if not len(addresses):
        return np.zeros(0, np.uint8), np.zeros((0, size), I64)
    first, last = int(addresses.min()), int(addresses.max()) + size
    for base, data in tensors:
        if base <= first and last <= base + data.nbytes:
            return data, (addresses - U64(base)).astype(I64)[:, None] + np.arange(size)
    raise Fault(f"{what} touches {first:#x} to {last:#x}, outside of every tensor")


class Lds:
    def __init__(self, size: int, rng: np.random.Generator):
        self.bytes = rng.integers(0, 256, size, dtype=np.uint8)
        # Who wrote, added to or read each byte since the last barrier: a bit a wave, for up to 32.
        self.seen = {how: np.zeros(size, U32) for how in ("write", "add", "read")}

    def barrier(self) -> None:
        for waves in self.seen.values():
            waves[:] = 0

    def touch(self, at: np.ndarray, wave: int, how: str, values: np.ndarray | None) -> None:
        """Where waves hold copies of the same data they all write it: that is no race."""
        me = U32(1 << wave)
        # Reading clashes with no reading, and adding with no adding.
        kinds = [self.seen[other][at] for other in self.seen if other != how or how == "write"]
        clash = functools.reduce(operator.or_, kinds) & ~me
        if how == "write":
            clash[self.bytes[at] == values] = 0
        if clash.any():
            raise Fault(f"LDS race at byte {at[clash != 0][0]} ({how})")
        self.seen[how][at] |= me


class Wave:
    def __init__(self, number: int, tensors, lds: Lds, rng: np.random.Generator):
        self.number, self.tensors, self.lds = number, tensors, lds
        self.v = rng.integers(0, 1 << 32, (256, 64), dtype=U32)
        self.s = [int(x) for x in rng.integers(0, 1 << 32, 128)]
        self.scc = self.pc = self.count = 0
        self.junk = int(rng.integers(0, 1 << 63)) * 2 + 1
        self.set_exec(FULL)

    def set_exec(self, mask: int) -> None:
        self.exec = mask
        self.s[EXEC], self.s[EXEC + 1] = mask & 0xFFFFFFFF, mask >> 32
        self.mask = None if mask == FULL else lanes_of(mask)

    def s64(self, i: int) -> int:
        return self.s[i] | self.s[i + 1] << 32

    def set32(self, i: int, value: int) -> None:
        self.s[i] = value & 0xFFFFFFFF
        if i >= EXEC:
            self.set_exec(self.s64(EXEC))

    def set64(self, i: int, value: int) -> None:
        self.set32(i, value)
        self.set32(i + 1, value >> 32)

    def set_scc(self, _: int, value: bool) -> None:
        self.scc = int(value)

    def write(self, i: int, value, mask=None) -> None:
        """To vector register i, of the lanes that are active (and in `mask`)."""
        if mask is None:
            mask = self.mask
        elif self.mask is not None:
            mask = mask & self.mask
        if mask is None:
            self.v[i] = value
        else:
            np.copyto(self.v[i], value, where=mask)

    def write64(self, i: int, value) -> None:
        self.write(i, value.astype(U32))
        self.write(i + 1, (value >> U64(32)).astype(U32))


# --- operands --------------------------------------------------------------------------------

# What an operand is read or written as:
# vu32, vi64, ...  of each lane: an array, or one value for all lanes
# su32, si64, ...  a scalar: a Python integer; behind a + is what SCC says of a result
# lanes            64 booleans, as a mask in two scalar registers
# carry            the same, and what it has of lanes that are off is nothing to rely on
# scc, exec        implied: no operand names them
LANE_TYPES = {"vu32": U32, "vi32": I32, "vf32": F32, "vu64": U64, "vi64": I64}
IMPLIED = ("scc", "exec", "exec+any")
NAMED = {"vcc": VCC, "vcc_lo": VCC, "vcc_hi": VCC + 1, "exec": EXEC, "exec_lo": EXEC,
         "exec_hi": EXEC + 1, "m0": 124}  # fmt: skip


def register(text: str) -> tuple[str, int]:
    """('v' or 's', number of the first register), or ('', 0) where it is a constant."""
    if text in NAMED:
        return "s", NAMED[text]
    found = re.fullmatch(r"([vs])(?:(\d+)|\[(\d+):\d+\])", text)
    return (found[1], int(found[2] or found[3])) if found else ("", 0)


def number(text: str) -> int:
    bank, i = register(text)
    if not bank:
        raise Fault(f"{text} in place of a register")
    return i


@functools.cache
def source(kind: str, text: str = ""):
    """wave -> the operand; constants are sign-extended."""
    if kind in IMPLIED:
        return (lambda w: w.scc) if kind == "scc" else (lambda w: w.exec)
    if kind[1] in "if":
        bits, view = int(kind[2:]), LANE_TYPES.get(kind)
        plain = source(f"{kind[0]}u{bits}", text)
        return (lambda w: plain(w).view(view)) if view else (lambda w: signed(plain(w), bits))
    bank, i = register(text)
    if not bank:
        value = int(F32(text).view(U32)) if "." in text else int(text, 0)
        value = LANE_TYPES.get(kind, int)(value & (FULL if kind.endswith("64") else 0xFFFFFFFF))
        return lambda w: value
    readers = {
        "vu32 of v": lambda w: w.v[i],
        "vu32 of s": lambda w: U32(w.s[i]),
        "vu64 of v": lambda w: w.v[i].astype(U64) | w.v[i + 1].astype(U64) << U64(32),
        "vu64 of s": lambda w: U64(w.s64(i)),
        "su32 of s": lambda w: w.s[i],
        "su64 of s": lambda w: w.s64(i),
        "lanes of s": lambda w: lanes_of(w.s64(i)),
    }
    if f"{kind} of {bank}" not in readers:
        raise Fault(f"vector register {text} as a scalar")
    return readers[f"{kind} of {bank}"]


def with_scc(put, bits: int, test):
    def write(w: Wave, i: int, value: int) -> None:
        put(w, i, value & ((1 << bits) - 1))
        w.scc = int(test(value))

    return write


WRITERS = {
    "vu32": Wave.write,
    "vi32": lambda w, i, value, mask=None: w.write(i, value.view(U32), mask),
    "vf32": lambda w, i, value: w.write(i, value.view(U32)),
    "vu64": Wave.write64,
    "lanes": lambda w, i, lanes: w.set64(i, mask_of(lanes) & w.exec),
    "carry": lambda w, i, lanes: w.set64(i, mask_of(lanes) ^ (w.junk & ~w.exec)),
    "su32": Wave.set32,
    "su64": Wave.set64,
    "scc": Wave.set_scc,
    "su32+any": with_scc(Wave.set32, 32, lambda value: value & 0xFFFFFFFF != 0),
    "su64+any": with_scc(Wave.set64, 64, lambda value: value & FULL != 0),
    "exec+any": with_scc(lambda w, _, mask: w.set_exec(mask), 64, lambda mask: mask != 0),
    "su32+carry": with_scc(Wave.set32, 32, lambda value: not 0 <= value <= 0xFFFFFFFF),
    "su32+overflow": with_scc(Wave.set32, 32, lambda value: value != signed(value)),
}


# --- arithmetic ------------------------------------------------------------------------------


def bfe_u32(a, offset, width):
    return a >> (offset & 31) & (U32(1) << (width & 31)) - 1


def bfe_i32(a, offset, width):
    value, ones = bfe_u32(a, offset, width), (U32(1) << (width & 31)) - 1
    top = ones ^ ones >> 1
    return (value ^ top) - top


def reverse(a):
    octets = np.atleast_1d(a).view(np.uint8).reshape(-1, 4)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(U32).ravel()


RCP = 0  # v_rcp_f32 is good to 1 ulp: -1 and 1 take the float below and above the exact value


def rcp(x):
    with np.errstate(divide="ignore"):
        near, exact = F32(1) / x, 1 / x.astype(np.float64)
    if RCP:
        other_side = near < exact if RCP > 0 else near > exact
        near = np.where(other_side, np.nextafter(near, F32(RCP * np.inf)), near)
    return near


def bitop3(table: str, bits: int = 32):
    """The function of three bits that has this truth table."""
    rows, keep = [i for i in range(8) if int(table, 0) >> i & 1], U32((1 << bits) - 1)

    def run(a, b, c):
        terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in rows]
        return functools.reduce(operator.or_, terms, U32(0)) & keep

    return run


def carry_out(total):
    return total.astype(U32), (total < 0) | (total > 0xFFFFFFFF)


def mad_u64(a, b, c):
    total = a.astype(U64) * b + c
    return total, total < c


def swap(n: int):
    """Odd rows of n lanes of the first register change places with even ones of the second."""
    odd = (LANES & n) != 0

    def run(a, b, mask):
        if mask != FULL:
            raise Fault("permlane with lanes off")
        return np.where(odd, b[LANES ^ n], a), np.where(odd, b, a[LANES ^ n])

    return run


def fetch(lane, data, mask):
    """What `data` holds in another lane, zero where that is off."""
    return np.where(lanes_of(mask)[lane], data[lane], U32(0))


def swizzle(offset: str):
    found = re.fullmatch(r"swizzle\(SWAP,(\d+)\)", offset)
    if not found:
        raise Fault(f"unknown instruction: ds_swizzle_b32 {offset}")
    return functools.partial(fetch, LANES ^ int(found[1]))


# Name -> kinds of the operands written, kinds of those read, and the function between.
FORMS = {}
# These are functions of a modifier first.
MADE_BY = {"v_bitop3_b32": "bitop3", "v_bitop3_b16": "bitop3", "ds_swizzle_b32": "offset"}
# What an instruction may write that has such a suffix.
WITH_SUFFIX = {"dpp": [["vu32"], ["vi32"]], "sdwa": [["vu32"], ["vi32"], ["lanes"]]}


def define(to: str, sources: str, functions) -> None:
    """An instruction of fewer operands reads the first of `sources`."""
    for name, function in functions.items():
        FORMS[name] = to.split(), sources.split(), function


define("vu32", "vu32 vu32 vu32", {
    "v_mov_b32": lambda a: a, "v_not_b32": operator.invert, "v_bfrev_b32": reverse,
    "v_and_b32": operator.and_, "v_or_b32": operator.or_, "v_xor_b32": operator.xor,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_add_u32": operator.add, "v_sub_u32": operator.sub, "v_subrev_u32": lambda a, b: b - a,
    "v_sub_u32 clamp": lambda a, b: np.where(a < b, U32(0), a - b),
    "v_max_u32": np.maximum, "v_min_u32": np.minimum, "v_mul_lo_u32": operator.mul,
    "v_mul_hi_u32": lambda a, b: (a.astype(U64) * b >> 32).astype(U32),
    "v_mul_u32_u24": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mad_u32_u24": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_lshlrev_b32": lambda n, a: a << (n & 31),
    "v_lshrrev_b32": lambda n, a: a >> (n & 31),
    "v_lshlrev_b16": lambda n, a: a << (n & 15) & 0xFFFF,
    "v_bcnt_u32_b32": lambda a, b: np.bitwise_count(a).astype(U32) + b,
    "v_bfe_u32": bfe_u32, "v_bfe_i32": bfe_i32,
    "v_bfi_b32": lambda m, a, b: (m & a) | (~m & b),
    "v_alignbit_b32": lambda a, b, n: ((a.astype(U64) << 32 | b) >> (n & 31)).astype(U32),
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_lshl_add_u32": lambda a, n, b: (a << (n & 31)) + b,
    "v_add_lshl_u32": lambda a, b, n: (a + b) << (n & 31),
    "v_lshl_or_b32": lambda a, n, b: (a << (n & 31)) | b,
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bitop3_b32": bitop3, "v_bitop3_b16": lambda table: bitop3(table, 16),
})  # fmt: skip
define("vi32", "vi32 vi32 vi32", {
    "v_max_i32": np.maximum, "v_min_i32": np.minimum,
    "v_med3_i32": lambda a, b, c: np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c)),
    "v_ashrrev_i32": lambda n, a: a >> (n & 31),
    "v_mul_i32_i24": lambda a, b: (a << 8 >> 8) * (b << 8 >> 8),
    "v_mad_i32_i24": lambda a, b, c: (a << 8 >> 8) * (b << 8 >> 8) + c,
})  # fmt: skip
define("vf32", "vf32 vf32", {"v_rcp_f32": rcp, "v_rcp_iflag_f32": rcp, "v_mul_f32": operator.mul})
define("vf32", "vu32", {"v_cvt_f32_u32": lambda a: a.astype(F32)})
define("vu32", "vf32", {
    "v_cvt_u32_f32": lambda a: np.nan_to_num(a.astype(float)).clip(0, 0xFFFFFFFF).astype(U32),
})  # fmt: skip
define("vu64", "vu64", {"v_mov_b64": lambda a: a})
define("vu64 lanes", "vu32 vu32 vu64", {"v_mad_u64_u32": mad_u64})
define("vu32 carry", "vu32 vu32 lanes", {
    "v_add_co_u32": lambda a, b: carry_out(a.astype(I64) + b),
    "v_addc_co_u32": lambda a, b, carry: carry_out(a.astype(I64) + b + carry),
    "v_subrev_co_u32": lambda a, b: carry_out(b.astype(I64) - a),
})  # fmt: skip
define("vu32", "vu32 vu32 lanes", {"v_cndmask_b32": lambda a, b, mask: np.where(mask, b, a)})
define("vu32 vu32", "vu32 vu32 exec", {f"v_permlane{n}_swap_b32": swap(n) for n in (16, 32)})
define("vu32", "vu32 exec", {"ds_swizzle_b32": swizzle})
define("vu32", "vu32 vu32 exec", {"ds_bpermute_b32": lambda at, a, on: fetch(at >> 2 & 63, a, on)})
define("su32", "vu32 su32", {"v_readlane_b32": lambda a, lane: int(a[lane & 63])})
define("su32", "vu32 exec", {  # of the first active lane, or the first
    "v_readfirstlane_b32": lambda a, mask: int(a[(mask & -mask).bit_length() - 1 if mask else 0]),
})  # fmt: skip
define("su32+overflow", "si32 si32", {"s_add_i32": operator.add, "s_sub_i32": operator.sub})
define("su32+carry", "su32 su32", {
    "s_add_u32": operator.add, "s_sub_u32": operator.sub,
    **{f"s_lshl{n}_add_u32": lambda a, b, n=n: (a << n) + b for n in (1, 2, 3, 4)},
})  # fmt: skip
define("su32+carry", "su32 su32 scc", {
    "s_addc_u32": lambda a, b, scc: a + b + scc, "s_subb_u32": lambda a, b, scc: a - b - scc,
})  # fmt: skip
define("su32", "su32", {"s_brev_b32": lambda a: int(f"{a:032b}"[::-1], 2)})
define("su32", "su32 su32", {"s_mul_i32": operator.mul})
define("su64 exec+any", "su64 exec", {"s_and_saveexec_b64": lambda a, mask: (mask, a & mask)})
define("scc", "su32 su32", {
    "s_bitcmp0_b32": lambda a, b: not a >> (b & 31) & 1,
    "s_bitcmp1_b32": lambda a, b: a >> (b & 31) & 1,
})  # fmt: skip
for kind in ("u32", "i32"):
    define("su32", f"s{kind} s{kind}", {f"s_mul_hi_{kind}": lambda a, b: a * b >> 32})
    define("su32 scc", f"s{kind} s{kind}", {
        f"s_min_{kind}": lambda a, b: (min(a, b), a < b),
        f"s_max_{kind}": lambda a, b: (max(a, b), a >= b),
    })  # fmt: skip
define(
    "su32+any", "su32 su32", {"s_bfe_u32": lambda a, b: a >> (b & 31) & (1 << (b >> 16 & 127)) - 1}
)
define("su32+any", "si32 su32", {
    "s_abs_i32": abs, "s_bfe_i32": lambda a, b: signed(a >> (b & 31), b >> 16 & 127),
})  # fmt: skip
for bits in (32, 64):
    kind, result = f"su{bits}", f"su{bits}+any"
    define(kind, kind, {f"s_mov_b{bits}": lambda a: a})
    define(kind, f"{kind} {kind} scc", {f"s_cselect_b{bits}": lambda a, b, scc: a if scc else b})
    define(result, f"{kind} {kind}", {
        f"s_and_b{bits}": operator.and_, f"s_or_b{bits}": operator.or_,
        f"s_xor_b{bits}": operator.xor, f"s_andn2_b{bits}": lambda a, b: a & ~b,
        f"s_not_b{bits}": operator.invert,
    })  # fmt: skip
    define(result, f"{kind} su32", {
        f"s_lshl_b{bits}": lambda a, n, m=bits - 1: a << (n & m),
        f"s_lshr_b{bits}": lambda a, n, m=bits - 1: a >> (n & m),
    })  # fmt: skip
    define(result, f"si{bits} su32", {f"s_ashr_i{bits}": lambda a, n, m=bits - 1: a >> (n & m)})
for kind in ("u32", "i32", "u64", "i64"):
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        compare, scalar_name = getattr(operator, name), name.replace("ne", "lg")
        define("lanes", f"v{kind} v{kind}", {f"v_cmp_{name}_{kind}": compare})
        define("scc", f"s{kind} s{kind}", {f"s_cmp_{scalar_name}_{kind}": compare})


# --- decoding ---------------------------------------------------------------------------------


def dpp_source(plain, mods: dict[str, str]):
    """wave -> what each lane reads from another; and the lanes that are written."""
    rows, banks = (int(mods.pop(key), 0) for key in ("row_mask", "bank_mask"))
    enabled = (rows >> (LANES >> 4) & 1 != 0) & (banks >> (LANES >> 2 & 3) & 1 != 0)
    zero = mods.pop("bound_ctrl", None)  # else lanes without a source keep what they have
    name, text = mods.popitem()
    numbers = [int(x) for x in re.findall(r"\d+", text)] or [0]
    row, n = LANES & ~15, numbers[0]
    lanes = {  # that each lane reads from, -1 for none
        "quad_perm": (LANES & ~3) + np.resize(numbers, 4)[LANES & 3],
        "row_half_mirror": LANES ^ 7,
        "row_shr": np.where(LANES - n >= row, LANES - n, -1),
        "row_shl": np.where(LANES + n < row + 16, LANES + n, -1),
        "row_ror": row + (LANES - n) % 16,
        # A row's last lane to the next row, the first half's to the other.
        "row_bcast": row - 1 if n == 15 else np.where(LANES >= 32, 31, -1),
    }.get(name)
    if lanes is None:
        raise Fault(f"DPP {name}:{text}")
    there = lanes >= 0

    def moved(w):
        if w.mask is not None:  # whether it then reads the lanes that are off is unclear
            raise Fault("DPP with lanes off")
        return np.where(there, plain(w)[lanes], 0)

    return moved, enabled if zero else enabled & there


# Bits and position of what SDWA selects.
SDWA = {"DWORD": (32, 0), "WORD_0": (16, 0), "WORD_1": (16, 16),
        "BYTE_0": (8, 0), "BYTE_1": (8, 8), "BYTE_2": (8, 16), "BYTE_3": (8, 24)}  # fmt: skip


def sdwa_source(kind: str, text: str, select: str):
    """wave -> the selected byte or word of an operand, sign-extended where it says sext(...)."""
    whole = source("vu32", text.removeprefix("sext(").removesuffix(")"))
    bits, shift = SDWA[select]
    to, view = LANE_TYPES[kind], I32 if text.startswith("sext(") else U32
    return lambda w: ((whole(w) << (32 - bits - shift)).view(view) >> (32 - bits)).view(to)


def sdwa_result(value, mods: dict[str, str]):
    bits, shift = SDWA[mods.pop("dst_sel")]
    keep = U32((1 << bits) - 1)
    if mods.pop("dst_unused") != "UNUSED_PAD":
        raise Fault("SDWA that keeps the rest of a register")
    return lambda w: (value(w).view(U32) & keep) << shift


def split(operands: str) -> tuple[list[str], dict[str, str]]:
    """Comma-separated operands, and the modifiers that follow the last of them."""
    parts = [part.strip() for part in re.split(r",(?![^\[(]*[\])])", operands)]
    parts[-1], *words = parts[-1].split() or [""]
    return parts, {key: value for key, _, value in (word.partition(":") for word in words)}


def applied(f, sources):
    """wave -> f of the sources; not by a list of them, since most of the time goes by here."""
    if len(sources) == 1:
        (a,) = sources
        return lambda w: f(a(w))
    if len(sources) == 2:
        a, b = sources
        return lambda w: f(a(w), b(w))
    a, b, c = sources
    return lambda w: f(a(w), b(w), c(w))


def decode_form(name: str, suffix: str, ops: list[str], mods: dict[str, str]):
    """Of an instruction in FORMS: wave -> None, which runs it."""
    if found := re.fullmatch(r"s_(mov|add|cmp)k_(\w+)", name):
        # The last operand is a constant of 16 bits, extended as the operation has it.
        k = int(ops[-1], 0)
        ops[-1] = str(k & 0xFFFF if name.endswith("u32") else signed(k, 16))
        if found[1] == "add":
            ops.insert(1, ops[0])
        name = "s_mov_b32" if found[1] == "mov" else f"s_{found[1]}_{found[2]}"
    if "clamp" in mods:
        del mods["clamp"]
        name = f"{name} clamp"
    to, kinds, f = FORMS.get(name, ((), (), None))
    if not to or to not in WITH_SUFFIX.get(suffix, [to]):
        return None
    if name in MADE_BY:
        f = f(mods.pop(MADE_BY[name], "0"))
    rest = iter(ops * 2 if "_swap_" in name else ops)  # a swap reads what it writes
    places = [(WRITERS[kind], 0 if kind in IMPLIED else number(next(rest))) for kind in to]
    sources = []
    for kind in kinds:
        if kind in IMPLIED:
            sources.append(source(kind))
        elif text := next(rest, None):
            select = mods.pop(f"src{len(sources)}_sel", None)
            sources.append(sdwa_source(kind, text, select) if select else source(kind, text))
    written = ()
    if suffix == "dpp":
        sources[0], *written = dpp_source(sources[0], mods)
    value = applied(f, sources)
    if "dst_sel" in mods:
        value = sdwa_result(value, mods)
    if mods or next(rest, None):
        return None
    (put, first), *others = places
    if not others:
        return lambda w: put(w, first, value(w), *written)
    ((put_other, other),) = others

    def run(w):
        x, y = value(w)
        put(w, first, x)
        put_other(w, other, y)

    return run


SIZE = {"short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
SIZES = "|".join(SIZE)


def octets(w, first: int, size: int, active) -> np.ndarray:
    """The low `size` bytes from vector registers `first` on, of the active lanes."""
    words = np.ascontiguousarray(w.v[first : first + -(-size // 4)].T)
    return words.view(np.uint8)[active][:, :size]


def put_octets(w, first: int, values: np.ndarray, active) -> None:
    size = values.shape[1]
    words = np.zeros((64, -(-size // 4) * 4), np.uint8)
    words[active, :size] = values
    for i, word in enumerate(words.view(U32).T):
        w.write(first + i, word)


def transfer(w, load: bool, register: int, size: int, addresses, active) -> None:
    """Of two lanes that store to one address the later wins; hardware promises it to none."""
    data, at = cells_of(w.tensors, addresses, size, "load" if load else "store")
    if load:
        put_octets(w, register, data[at], active)
    else:
        data[at] = octets(w, register, size, active)


def lds_cells(w, address: int, offset: int, size: int, how: str, values=None) -> np.ndarray:
    """The bytes that each active lane touches, once it is sure that it may."""
    at = w.v[address][lanes_of(w.exec)].astype(I64) + offset
    if len(at) and (at.max() + size > len(w.lds.bytes) or (at % min(size, 4)).any()):
        raise Fault(f"LDS {at.min()} to {at.max() + size} of {len(w.lds.bytes)}")
    cells = at[:, None] + np.arange(size)
    w.lds.touch(cells, w.number, how, values)
    return cells


def decode_memory(name: str, ops: list[str], mods: dict[str, str]):
    offset = int(mods.pop("offset", "0"), 0)
    offsets = [int(mods.pop(f"offset{i}", "0"), 0) for i in (0, 1)]
    if set(mods) != ({"offen"} if name.startswith("buffer") else set()):
        return None
    if found := re.fullmatch(r"s_load_dword(?:x(\d+))?", name):
        to, base, more = number(ops[0]), number(ops[1]), source("su32", ops[2])
        words = int(found[1] or "1")

        def run(w):
            address = np.array([w.s64(base) + more(w)], U64)
            data, at = cells_of(w.tensors, address, 4 * words, "scalar load")
            w.s[to : to + words] = data[at].view(U32)[0].tolist()

        return run
    if found := re.fullmatch(rf"buffer_(load|store)_({SIZES})", name):
        load, size, more = found[1] == "load", SIZE[found[2]], source("su32", ops[3])
        data, address, resource = (number(op) for op in ops[:3])

        def run(w):
            base = w.s64(resource)
            if base >> 48 or w.s[resource + 3] != 0x27000:
                raise Fault(f"buffer descriptor {[hex(x) for x in w.s[resource : resource + 4]]}")
            active = lanes_of(w.exec)
            at = w.v[address] + U64(offset)
            if (at >> U64(32))[active].any():
                raise Fault("the offset into a buffer wraps around")
            # Raw buffer: what lies past num_records reads zero and is not written.
            active = active & (at + U64(size) <= U64(w.s[resource + 2]))
            transfer(w, load, data, size, at[active] + U64(base + more(w)), active)

        return run
    if found := re.fullmatch(rf"global_store_({SIZES})", name):
        size, data, far = SIZE[found[1]], number(ops[1]), ops[2] == "off"
        address = source("vu64" if far else "vu32", ops[0])
        base = source("su64", "0" if far else ops[2])

        def run(w):
            active = lanes_of(w.exec)
            at = address(w) + U64(base(w)) + U64(offset & FULL)
            transfer(w, False, data, size, at[active], active)

        return run
    found = re.fullmatch(r"ds_(read|write|add)(2?)(st64)?_[bu](\d+)", name)
    if not found or (found[1] == "add" and name != "ds_add_u32"):
        return None
    how, twice, far, bits = found.groups()
    size = int(bits) // 8
    scale = size * (64 if far else 1)
    offsets = [scale * i for i in offsets] if twice else [offset]
    first, second, *third = (number(op) for op in ops)

    def read(w):  # all of it before any register is written: the address may be one
        values = [w.lds.bytes[lds_cells(w, second, at, size, how)] for at in offsets]
        for i, value in enumerate(values):
            put_octets(w, first + i * max(1, size // 4), value, lanes_of(w.exec))

    def change(w):
        for at, data in zip(offsets, (second, *third), strict=True):
            values = octets(w, data, size, lanes_of(w.exec))
            cells = lds_cells(w, first, at, size, how, values)
            if how == "write":
                w.lds.bytes[cells] = values
            else:
                np.add.at(w.lds.bytes.view(U32), cells[:, 0] // 4, values.view(U32)[:, 0])

    return read if how == "read" else change


CONTROL = {
    "s_branch": lambda w: True,
    "s_cbranch_scc0": lambda w: not w.scc,
    "s_cbranch_scc1": lambda w: w.scc,
    "s_cbranch_vccz": lambda w: w.s64(VCC) == 0,
    "s_cbranch_vccnz": lambda w: w.s64(VCC) != 0,
    "s_cbranch_execz": lambda w: w.exec == 0,
    "s_cbranch_execnz": lambda w: w.exec != 0,
}
# The wave stops at the last two, and passes the others.
NO_FUNCTION = ("s_nop", "s_waitcnt", "s_barrier", "s_endpgm")
Instruction = namedtuple("Instruction", "name text run")


def decode(text: str) -> Instruction:
    """One line of assembly. Raises Fault, naming it, where it is not known."""
    name, _, rest = text.partition(" ")
    if name in CONTROL or name in NO_FUNCTION:
        return Instruction(name, text, CONTROL.get(name))
    ops, mods = split(rest.strip())
    base, suffix = re.fullmatch(r"(\w+?)(?:_(e32|e64|dpp|sdwa))?", name).groups()
    run = decode_form(base, suffix, ops, mods) or decode_memory(base, ops, mods)
    if run is None:
        raise Fault(f"unknown instruction: {text}")
    return Instruction(name, text, run)


class Program:
    """A kernel, decoded once from the assembly text that Triton keeps as asm["amdgcn"].

    labels  where each stands, in instructions
    ran     how often each instruction has run, over all launches
    """

    def __init__(self, text: str, kernel: str):
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.ran: Counter[int] = Counter()
        branches = []
        body = text[text.index(f"\n{kernel}:") :]
        for with_comment in body.split("\t.section")[0].splitlines():
            line = with_comment.split(";")[0].rstrip()
            if found := re.fullmatch(r"([.\w$]+):", line):
                self.labels[found[1]] = len(self.code)
            elif re.match(r"\s+[a-z]", line):
                instruction = decode(line.strip())
                if instruction.name in CONTROL:
                    branches.append((len(self.code), line.split()[1]))
                self.code.append(instruction)
        self.targets = {at: self.labels[label] for at, label in branches}

    def run_wave(self, w: Wave, limit: int) -> bool:
        """Until the wave's next barrier (False) or its end (True)."""
        code, targets, ran, pc = self.code, self.targets, self.ran, w.pc
        try:
            while True:
                one = code[pc]
                ran[pc] += 1
                w.count += 1
                if w.count > limit:
                    raise Fault("no end")
                if pc in targets:
                    pc = targets[pc] if one.run(w) else pc + 1
                    continue
                pc += 1
                if one.run is not None:
                    one.run(w)
                elif one.name in ("s_barrier", "s_endpgm"):
                    return one.name == "s_endpgm"
        except Fault as fault:
            raise Fault(f"wave {w.number}, {one.text.strip()}: {fault}") from None
        finally:
            w.pc = pc


def launch(
    program: Program, grid: int, waves: int, kernarg: bytes, tensors, lds: int, *,
    user_sgprs: int = 2, preload: int = 0, entry: int = 0, seed: int = 0, limit: int = 20_000_000,
) -> None:  # fmt: skip
    """Run `grid` workgroups of `waves` waves, in an order that `seed` picks.

    tensors: (address, uint8 array) of each buffer. user_sgprs: scalar registers before the one with
    the workgroup's number. preload: words of the kernel arguments that are in them when the kernel
    starts, at instruction `entry`.
    """
    arguments = np.frombuffer(kernarg, np.uint8).copy()
    tensors = [(arguments.ctypes.data, arguments), *tensors]
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        for group in rng.permutation(grid):
            shared = Lds(max(lds, 4), rng)
            all_waves = []
            for number in range(waves):
                w = Wave(number, tensors, shared, rng)
                w.s[0], w.s[1] = arguments.ctypes.data & 0xFFFFFFFF, arguments.ctypes.data >> 32
                w.s[2 : 2 + preload] = struct.unpack_from(f"<{preload}I", kernarg)
                w.s[user_sgprs] = int(group)
                w.v[0] = number * 64 + LANES
                w.pc = entry
                all_waves.append(w)
            ended = [False]
            while not all(ended):
                ended = [program.run_wave(all_waves[i], limit) for i in rng.permutation(waves)]
                if any(ended) and not all(ended):
                    raise Fault("a wave ended while others wait at a barrier")
                shared.barrier()
