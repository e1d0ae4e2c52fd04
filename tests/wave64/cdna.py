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

# One function decodes a family of instructions, and has a branch for each form of it.
# ruff: noqa: PLR0911, PLR0912, PLR0915

import re
import struct
from collections import Counter

import numpy as np

U32, I32, U64, I64, F32 = np.uint32, np.int32, np.uint64, np.int64, np.float32
LANES = np.arange(64)
FULL = (1 << 64) - 1
VCC, M0, EXEC, SCC = 106, 124, 126, 253


class Fault(Exception):  # noqa: N818
    """The program did what it must not, or what this interpreter does not know."""


# --- masks -----------------------------------------------------------------------------------

_masks: dict[int, np.ndarray] = {}


def lanes_of(mask: int) -> np.ndarray:
    found = _masks.get(mask)
    if found is None:
        if len(_masks) > 50_000:
            _masks.clear()
        bits = np.unpackbits(np.frombuffer(struct.pack("<Q", mask), np.uint8), bitorder="little")
        found = _masks[mask] = bits.astype(bool)
    return found


def mask_of(lanes: np.ndarray) -> int:
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


# --- memory ----------------------------------------------------------------------------------


class Memory:
    """The tensors of a launch, at the addresses they have on the host."""

    def __init__(self):
        self.regions = []  # (base, end, bytes)

    def add(self, base: int, data: np.ndarray) -> None:
        self.regions.append((base, base + data.nbytes, data))

    def find(self, first: int, last: int, what: str) -> tuple[int, np.ndarray]:
        for base, end, data in self.regions:
            if base <= first and last <= end:
                return base, data
        raise Fault(f"{what} touches {first:#x} to {last:#x}, outside of every tensor")

    def scalar(self, address: int, words: int) -> list[int]:
        base, data = self.find(address, address + 4 * words, "scalar load")
        return list(struct.unpack_from(f"<{words}I", data, address - base))

    def cells(self, addresses: np.ndarray, size: int, what: str):
        base, data = self.find(int(addresses.min()), int(addresses.max()) + size, what)
        return data, (addresses - U64(base)).astype(I64)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if not len(addresses):
            return np.zeros((0, size), np.uint8)
        data, at = self.cells(addresses, size, "load")
        return data[at[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Values uint8 [lanes, size]. Of two lanes at one address the later wins, as on hardware
        none is promised to; the race check is the caller's."""
        if len(addresses):
            size = values.shape[1]
            data, at = self.cells(addresses, size, "store")
            data[at[:, None] + np.arange(size)] = values


# --- a wave ----------------------------------------------------------------------------------


class Lds:
    def __init__(self, size: int, waves: int, rng: np.random.Generator):
        self.bytes = rng.integers(0, 256, size, dtype=np.uint8)
        self.epoch = 0
        # Who wrote, added to or read each byte since the last barrier: a bit a wave.
        self.wrote, self.added, self.read = (np.zeros(size, np.uint32) for _ in range(3))

    def barrier(self) -> None:
        for seen in (self.wrote, self.added, self.read):
            seen[:] = 0

    def touch(self, at: np.ndarray, wave: int, how: str, pc: str, values=None) -> None:
        """Where waves hold copies of the same data they all write it: that is no race."""
        me = U32(1 << wave)
        others = ~me
        clash = self.wrote[at] & others
        if how != "read":
            clash |= self.read[at] & others
        if how != "add":
            clash |= self.added[at] & others
        if how == "write":
            clash[self.bytes[at] == values] = 0
        if clash.any():
            byte = at.ravel()[clash.ravel().nonzero()[0][0]]
            raise Fault(f"LDS race at byte {byte}: {pc} ({how})")
        seen = {"write": self.wrote, "add": self.added, "read": self.read}[how]
        seen[at] |= me


class Wave:
    def __init__(self, number: int, memory: Memory, lds: Lds, rng: np.random.Generator):
        self.number, self.memory, self.lds = number, memory, lds
        self.v = rng.integers(0, 1 << 32, (256, 64), dtype=U32)
        self.s = [int(x) for x in rng.integers(0, 1 << 32, 128)]
        self.scc = 0
        self.pc = 0
        self.count = 0
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
        value &= FULL
        self.s[i], self.s[i + 1] = value & 0xFFFFFFFF, value >> 32
        if i >= EXEC:
            self.set_exec(value)

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


# --- operands --------------------------------------------------------------------------------

_FLOATS = {"0.5", "1.0", "2.0", "4.0", "-0.5", "-1.0", "-2.0", "-4.0"}
_NAMED = {"vcc": VCC, "vcc_lo": VCC, "vcc_hi": VCC + 1, "exec": EXEC, "exec_lo": EXEC,
          "exec_hi": EXEC + 1, "m0": M0}  # fmt: skip


def register(text: str):
    """('v' or 's', first register, registers) or None where it is a constant."""
    if text in _NAMED:
        return "s", _NAMED[text], 2 if text in ("vcc", "exec") else 1
    found = re.fullmatch(r"([vs])(?:(\d+)|\[(\d+):(\d+)\])", text)
    if not found:
        return None
    kind, one, first, last = found.groups()
    return (kind, int(one), 1) if one else (kind, int(first), int(last) - int(first) + 1)


def constant(text: str) -> int:
    if text in _FLOATS:
        return int(F32(float(text)).view(U32))
    return int(text, 0)


def vector_source(text: str):
    """wave -> uint32 [64] or a scalar uint32."""
    where = register(text)
    if where is None:
        value = U32(constant(text) & 0xFFFFFFFF)
        return lambda w: value
    kind, i, _ = where
    return (lambda w: w.v[i]) if kind == "v" else (lambda w: U32(w.s[i]))


def vector_source64(text: str):
    """wave -> uint64 [64] or a scalar uint64; inline constants are sign-extended."""
    where = register(text)
    if where is None:
        value = U64(constant(text) & FULL)
        return lambda w: value
    kind, i, _ = where
    if kind == "s":
        return lambda w: U64(w.s64(i))
    return lambda w: w.v[i].astype(U64) | w.v[i + 1].astype(U64) << U64(32)


def scalar_source(text: str, wide: bool = False):
    where = register(text)
    if where is None:
        value = constant(text) & (FULL if wide else 0xFFFFFFFF)
        return lambda w: value
    kind, i, _ = where
    if kind != "s":
        raise Fault(f"vector register {text} as a scalar")
    return (lambda w: w.s64(i)) if wide else (lambda w: w.s[i])


# --- vector arithmetic: uint32 arrays (or scalars) in, uint32 array out ------------------------


def i32(x):
    return x.view(I32) if isinstance(x, np.ndarray) else np.int32(signed(int(x)))


def f32(x):
    return x.view(F32)


def i24(x):
    return i32(x << U32(8)) >> np.int32(8)


def u64(x):
    return x.astype(U64)


def bits32(x):
    """Of what numpy made of it, the low 32 bits."""
    return np.asarray(x).astype(U64 if np.asarray(x).dtype == U64 else I64).astype(U32)


def ashr(a, n):
    return (i32(a) >> i32(n & U32(31))).view(U32)


def bfe(a, offset, width, sign):
    value = np.broadcast_to(a, (64,)).astype(U64) >> u64(offset & U32(31))
    width = u64(np.broadcast_to(width & U32(31), (64,)))
    value = value & ((U64(1) << width) - U64(1))
    if sign:
        top = np.where(width > 0, (value >> (np.maximum(width, U64(1)) - U64(1))) & U64(1), U64(0))
        value = value | np.where(top > 0, ~((U64(1) << width) - U64(1)), U64(0))
    return value.astype(U32)


def reverse(a):
    a = np.broadcast_to(a, (64,)).astype(U32)
    octets = a.view(np.uint8).reshape(64, 4)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(U32).ravel()


def to_u32(x):
    x = np.nan_to_num(f32(x).astype(np.float64), nan=0.0)
    return np.clip(np.trunc(x), 0, 0xFFFFFFFF).astype(U64).astype(U32)


RCP = 0  # v_rcp_f32 is good to 1 ulp: -1 and 1 take the float below and above the exact value


def rcp(x):
    x = np.atleast_1d(f32(x))
    with np.errstate(divide="ignore"):
        near, exact = F32(1) / x, 1 / x.astype(np.float64)
    if RCP > 0:
        near = np.where(near < exact, np.nextafter(near, F32(np.inf)), near)
    elif RCP < 0:
        near = np.where(near > exact, np.nextafter(near, F32(-np.inf)), near)
    return near.astype(F32).view(U32)


def bitop3(table):
    def run(a, b, c):
        result = U32(0)
        for i in range(8):
            if table >> i & 1:
                result = result | (
                    (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
                )
        return result

    return run


VECTOR = {
    "v_mov_b32": lambda a: a,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_not_b32": lambda a: ~a,
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_subrev_u32": lambda a, b: b - a,
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: (u64(a) * u64(b) >> U64(32)).astype(U32),
    "v_mul_i32_i24": lambda a, b: (i24(a) * i24(b)).view(U32),
    "v_mad_i32_i24": lambda a, b, c: (i24(a) * i24(b)).view(U32) + c,
    "v_mad_u32_u24": lambda a, b, c: (a & U32(0xFFFFFF)) * (b & U32(0xFFFFFF)) + c,
    "v_mul_u32_u24": lambda a, b: (a & U32(0xFFFFFF)) * (b & U32(0xFFFFFF)),
    "v_lshlrev_b32": lambda n, a: a << (n & U32(31)),
    "v_lshrrev_b32": lambda n, a: a >> (n & U32(31)),
    "v_lshlrev_b16": lambda n, a: (a << (n & U32(15))) & U32(0xFFFF),
    "v_ashrrev_i32": lambda n, a: ashr(a, n),
    "v_max_i32": lambda a, b: np.maximum(i32(a), i32(b)).view(U32),
    "v_min_i32": lambda a, b: np.minimum(i32(a), i32(b)).view(U32),
    "v_max_u32": np.maximum,
    "v_min_u32": np.minimum,
    "v_med3_i32": lambda a, b, c: np.maximum(
        np.minimum(i32(a), i32(b)), np.minimum(np.maximum(i32(a), i32(b)), i32(c))
    ).view(U32),
    "v_bcnt_u32_b32": lambda a, b: np.bitwise_count(a).astype(U32) + b,
    "v_bfe_u32": lambda a, o, n: bfe(a, o, n, sign=False),
    "v_bfe_i32": lambda a, o, n: bfe(a, o, n, sign=True),
    "v_bfi_b32": lambda m, a, b: (m & a) | (~m & b),
    "v_bfrev_b32": reverse,
    "v_alignbit_b32": lambda a, b, n: ((u64(a) << U64(32) | u64(b)) >> (u64(n) & U64(31))).astype(
        U32
    ),
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_lshl_add_u32": lambda a, n, b: (a << (n & U32(31))) + b,
    "v_add_lshl_u32": lambda a, b, n: (a + b) << (n & U32(31)),
    "v_lshl_or_b32": lambda a, n, b: (a << (n & U32(31))) | b,
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_cvt_f32_u32": lambda a: np.atleast_1d(a).astype(F32).view(U32),
    "v_cvt_u32_f32": to_u32,
    "v_rcp_f32": rcp,
    "v_rcp_iflag_f32": rcp,
    "v_mul_f32": lambda a, b: (f32(a) * f32(b)).view(U32),
}
SATURATED = {"v_sub_u32": lambda a, b: np.where(a < b, U32(0), a - b)}
COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip

# Lane that DPP reads from, -1 for none.
ROW = LANES & ~15


def dpp_lanes(control: str) -> np.ndarray:
    name, _, value = control.partition(":")
    if name == "quad_perm":
        return (LANES & ~3) + np.array([int(x) for x in value.strip("[]").split(",")])[LANES & 3]
    if name == "row_half_mirror":
        return LANES ^ 7
    if name == "row_mirror":
        return LANES ^ 15
    n = int(value)
    if name == "row_shr":
        return np.where(LANES - n >= ROW, LANES - n, -1)
    if name == "row_shl":
        return np.where(LANES + n < ROW + 16, LANES + n, -1)
    if name == "row_ror":
        return ROW + (LANES - n) % 16
    if name == "row_bcast":  # a row's last lane to the next row, the first half's to the other
        source = ROW - 1 if n == 15 else np.where(LANES >= 32, 31, -1)
        return np.where(source >= 0, source, -1)
    raise Fault(f"DPP {control}")


def sdwa_source(operand: str, select: str, source):
    """wave -> the selected byte or word of an operand, sign-extended where it says sext(...)."""
    extended = operand.startswith("sext(")
    a = source(operand.removeprefix("sext(").removesuffix(")"))
    if select == "DWORD":
        return a
    kind, n = select.split("_")
    bits = 8 if kind == "BYTE" else 16
    up, down = U32(32 - bits * (int(n) + 1)), U32(32 - bits)
    if extended:
        return lambda w: ashr(a(w) << up, down)
    return lambda w: (a(w) << up) >> down


# --- scalar arithmetic: Python integers, (value, SCC or None) out -------------------------------


def add_i32(a, b):
    total = signed(a) + signed(b)
    return total, int(not -(1 << 31) <= total < 1 << 31)


def sub_i32(a, b):
    total = signed(a) - signed(b)
    return total, int(not -(1 << 31) <= total < 1 << 31)


def logic(f, bits):
    def run(*args):
        value = f(*args) & ((1 << bits) - 1)
        return value, int(value != 0)

    return run


def sbfe(a, b, sign):
    offset, width = b & 31, b >> 16 & 0x7F
    value = (signed(a) if sign else a) >> offset & ((1 << width) - 1)
    if sign and width:
        value = signed(value, width)
    return value & 0xFFFFFFFF, int(value != 0)


def pick(a, b, first):
    return (a if first else b), int(first)


SCALAR32 = {
    "s_mov_b32": lambda a: (a, None),
    "s_add_i32": add_i32,
    "s_sub_i32": sub_i32,
    "s_add_u32": lambda a, b: (a + b, int(a + b > 0xFFFFFFFF)),
    "s_sub_u32": lambda a, b: (a - b, int(b > a)),
    "s_mul_i32": lambda a, b: (a * b, None),
    "s_mul_hi_u32": lambda a, b: (a * b >> 32, None),
    "s_mul_hi_i32": lambda a, b: (signed(a) * signed(b) >> 32, None),
    "s_and_b32": logic(lambda a, b: a & b, 32),
    "s_or_b32": logic(lambda a, b: a | b, 32),
    "s_xor_b32": logic(lambda a, b: a ^ b, 32),
    "s_andn2_b32": logic(lambda a, b: a & ~b, 32),
    "s_not_b32": logic(lambda a: ~a, 32),
    "s_brev_b32": lambda a: (int(f"{a:032b}"[::-1], 2), None),
    "s_lshl_b32": logic(lambda a, b: a << (b & 31), 32),
    "s_lshr_b32": logic(lambda a, b: a >> (b & 31), 32),
    "s_ashr_i32": logic(lambda a, b: signed(a) >> (b & 31), 32),
    "s_abs_i32": logic(lambda a: abs(signed(a)), 32),
    "s_min_i32": lambda a, b: pick(a, b, signed(a) < signed(b)),
    "s_max_i32": lambda a, b: pick(a, b, signed(a) >= signed(b)),
    "s_min_u32": lambda a, b: pick(a, b, a < b),
    "s_max_u32": lambda a, b: pick(a, b, a >= b),
    "s_bfe_u32": lambda a, b: sbfe(a, b, sign=False),
    "s_bfe_i32": lambda a, b: sbfe(a, b, sign=True),
    **{
        f"s_lshl{n}_add_u32": lambda a, b, n=n: ((a << n) + b, int((a << n) + b > 0xFFFFFFFF))
        for n in (1, 2, 3, 4)
    },
}
SCALAR64 = {
    "s_mov_b64": lambda a: (a, None),
    "s_and_b64": logic(lambda a, b: a & b, 64),
    "s_or_b64": logic(lambda a, b: a | b, 64),
    "s_xor_b64": logic(lambda a, b: a ^ b, 64),
    "s_andn2_b64": logic(lambda a, b: a & ~b, 64),
    "s_not_b64": logic(lambda a: ~a, 64),
}
SHIFT64 = {
    "s_ashr_i64": lambda a, n: signed(a, 64) >> n,
    "s_lshr_b64": lambda a, n: a >> n,
    "s_lshl_b64": lambda a, n: a << n,
}
SCOMPARE = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "lg": lambda a, b: a != b,
}  # fmt: skip


# --- decoding ---------------------------------------------------------------------------------


def split(operands: str) -> tuple[list[str], dict[str, str]]:
    """Comma-separated operands, and the modifiers that follow the last of them."""
    parts = [part.strip() for part in re.split(r",(?![^\[(]*[\])])", operands)] if operands else []
    modifiers: dict[str, str] = {}
    if parts:
        first, *rest = parts[-1].split()
        parts[-1] = first
        for word in rest:
            key, _, value = word.partition(":")
            modifiers[key] = value
    return parts, modifiers


class Instruction:
    def __init__(self, name: str, text: str, run):
        self.name, self.text, self.run = name, text, run


def decode_scalar(name, ops, mods):
    if name in SCALAR32 or name in SCALAR64:
        wide = name in SCALAR64
        f = (SCALAR64 if wide else SCALAR32)[name]
        to = register(ops[0])[1]
        sources = [scalar_source(op, wide) for op in ops[1:]]
        put = Wave.set64 if wide else Wave.set32

        def run(w):
            value, scc = f(*[source(w) for source in sources])
            put(w, to, value)
            if scc is not None:
                w.scc = scc

        return run
    if name in SHIFT64:
        f = SHIFT64[name]
        to, a, b = register(ops[0])[1], scalar_source(ops[1], True), scalar_source(ops[2])

        def run(w):
            value = f(a(w), b(w) & 63) & FULL
            w.set64(to, value)
            w.scc = int(value != 0)

        return run
    if name in ("s_addc_u32", "s_subb_u32"):
        to, a, b = register(ops[0])[1], scalar_source(ops[1]), scalar_source(ops[2])
        add = name == "s_addc_u32"

        def run(w):
            total = a(w) + b(w) + w.scc if add else a(w) - b(w) - w.scc
            w.set32(to, total)
            w.scc = int(not 0 <= total <= 0xFFFFFFFF)

        return run
    if name in ("s_cselect_b32", "s_cselect_b64"):
        wide = name.endswith("64")
        to = register(ops[0])[1]
        a, b = (scalar_source(op, wide) for op in ops[1:])
        put = Wave.set64 if wide else Wave.set32
        return lambda w: put(w, to, a(w) if w.scc else b(w))
    if found := re.fullmatch(r"s_cmp(k?)_(\w\w)_([iu])(32|64)", name):
        f, sign, bits = SCOMPARE[found[2]], found[3] == "i", int(found[4])
        if found[1]:  # a 16-bit constant, extended as the comparison has it
            ops = [ops[0], str(signed(constant(ops[1]), 16) if sign else constant(ops[1]) & 0xFFFF)]
        a, b = (scalar_source(op, bits == 64) for op in ops)
        if sign:
            return lambda w: setattr(w, "scc", int(f(signed(a(w), bits), signed(b(w), bits))))
        return lambda w: setattr(w, "scc", int(f(a(w), b(w))))
    if name in ("s_bitcmp0_b32", "s_bitcmp1_b32"):
        a, b = (scalar_source(op) for op in ops)
        wanted = int(name[8] == "1")
        return lambda w: setattr(w, "scc", int((a(w) >> (b(w) & 31) & 1) == wanted))
    if name in ("s_movk_i32", "s_addk_i32"):
        to, k = register(ops[0])[1], signed(constant(ops[1]), 16)
        if name == "s_movk_i32":
            return lambda w: w.set32(to, k)

        def run(w):
            value, w.scc = add_i32(w.s[to], k & 0xFFFFFFFF)
            w.set32(to, value)

        return run
    if found := re.fullmatch(r"s_(and|or|andn2)_saveexec_b64", name):
        to, a = register(ops[0])[1], scalar_source(ops[1], True)
        f = {
            "and": lambda x, e: x & e, "or": lambda x, e: x | e, "andn2": lambda x, e: x & ~e
        }[found[1]]  # fmt: skip

        def run(w):
            old, new = w.exec, f(a(w), w.exec) & FULL
            w.set64(to, old)
            w.set_exec(new)
            w.scc = int(new != 0)

        return run
    if found := re.fullmatch(r"s_load_dword(?:x(\d+))?", name):
        words = int(found[1] or 1)
        to, base, offset = register(ops[0])[1], register(ops[1])[1], scalar_source(ops[2])

        def run(w):
            for i, word in enumerate(w.memory.scalar(w.s64(base) + offset(w), words)):
                w.s[to + i] = word

        return run
    return None


def decode_vector(name, ops, mods, suffix):
    if name == "v_mov_b64":
        to, a = register(ops[0])[1], vector_source64(ops[1])

        def run(w):
            value = np.broadcast_to(a(w), (64,))
            w.write(to, value.astype(U32))
            w.write(to + 1, (value >> U64(32)).astype(U32))

        return run
    if name in ("v_readlane_b32", "v_readfirstlane_b32"):
        to, source = register(ops[0])[1], register(ops[1])[1]
        if name == "v_readlane_b32":
            lane = scalar_source(ops[2])
            return lambda w: w.set32(to, int(w.v[source][lane(w) & 63]))

        def run(w):  # of the first active lane, or the first
            lane = (w.exec & -w.exec).bit_length() - 1 if w.exec else 0
            w.set32(to, int(w.v[source][lane]))

        return run
    if found := re.fullmatch(r"v_permlane(16|32)_swap_b32", name):
        a, b = register(ops[0])[1], register(ops[1])[1]
        half = int(found[1])
        high = (LANES & half) != 0

        def run(w):
            if w.mask is not None:
                raise Fault(f"{name} with lanes off")
            x, y = w.v[a].copy(), w.v[b].copy()
            w.v[a][high], w.v[b][~high] = y[~high], x[high]

        return run
    if found := re.fullmatch(r"v_cmp_(\w\w)_([iu])(32|64)", name):
        f = COMPARE[found[1]]
        kind = {"i32": I32, "u32": U32, "i64": I64, "u64": U64}[found[2] + found[3]]
        to = register(ops[0])[1]
        source = vector_source64 if found[3] == "64" else vector_source
        if suffix == "sdwa":
            a, b = (sdwa_source(ops[1 + i], mods[f"src{i}_sel"], source) for i in (0, 1))
        else:
            a, b = (source(op) for op in ops[1:])

        def run(w):
            x, y = (np.asarray(one(w)).view(kind) for one in (a, b))
            w.set64(to, mask_of(np.broadcast_to(f(x, y), (64,))) & w.exec)

        return run
    if name == "v_cndmask_b32":
        to, a, b = register(ops[0])[1], vector_source(ops[1]), vector_source(ops[2])
        by = register(ops[3])[1]
        return lambda w: w.write(to, np.where(lanes_of(w.s64(by)), b(w), a(w)))
    if found := re.fullmatch(r"v_(add|addc|sub|subrev|subb)_co_u32", name):
        to, out, kind = register(ops[0])[1], register(ops[1])[1], found[1]
        a, b = vector_source(ops[2]), vector_source(ops[3])
        carry = register(ops[4])[1] if kind in ("addc", "subb") else None

        def run(w):
            x, y = (np.broadcast_to(one(w), (64,)).astype(I64) for one in (a, b))
            if kind == "subrev":
                x, y = y, x
            if not kind.startswith("add"):
                y = -y
            total = x + y
            if carry is not None:
                into = lanes_of(w.s64(carry)).astype(I64)
                total = total + (into if kind == "addc" else -into)
            w.write(to, total.astype(U32))
            # What lanes that are off leave in the carry is nothing to rely on.
            w.set64(out, mask_of((total < 0) | (total > 0xFFFFFFFF)) ^ (w.junk & ~w.exec))

        return run
    if name == "v_mad_u64_u32":
        to, out, c = register(ops[0])[1], register(ops[1])[1], vector_source64(ops[4])
        a, b = vector_source(ops[2]), vector_source(ops[3])

        def run(w):
            addend = np.broadcast_to(c(w), (64,))
            total = u64(np.broadcast_to(a(w), (64,))) * u64(b(w)) + addend
            w.write(to, total.astype(U32))
            w.write(to + 1, (total >> U64(32)).astype(U32))
            w.set64(out, mask_of(total < addend) & w.exec)

        return run
    if name in ("v_bitop3_b32", "v_bitop3_b16"):
        f = bitop3(int(mods.pop("bitop3", "0"), 0))
        if name.endswith("16"):
            g = f
            f = lambda a, b, c: g(a, b, c) & U32(0xFFFF)  # noqa: E731
    else:
        f = VECTOR.get(name)
    if "clamp" in mods:
        f = SATURATED.get(name)
    if f is None:
        return None
    to = register(ops[0])[1]
    if suffix == "sdwa":
        sources = [
            sdwa_source(op, mods[f"src{i}_sel"], vector_source) for i, op in enumerate(ops[1:])
        ]
    else:
        sources = [vector_source(op) for op in ops[1:]]
    if suffix == "dpp":
        (control,) = (
            f"{key}:{value}" for key, value in mods.items()
            if key.startswith(("quad_perm", "row_")) and key != "row_mask"
        )  # fmt: skip
        lanes = dpp_lanes(control)
        rows, banks = int(mods["row_mask"], 0), int(mods["bank_mask"], 0)
        zero = "bound_ctrl" in mods  # else lanes without a source keep what they have
        enabled = (rows >> (LANES >> 4) & 1 != 0) & (banks >> (LANES >> 2 & 3) & 1 != 0)
        first, *others = sources

        def run(w):
            if w.mask is not None:  # whether it then reads the lanes that are off is unclear
                raise Fault("DPP with lanes off")
            there = lanes >= 0
            moved = np.where(there, first(w)[lanes], U32(0))
            w.write(to, f(moved, *[one(w) for one in others]), enabled if zero else enabled & there)

        return run
    if suffix == "sdwa":
        to_select = mods["dst_sel"]
        if mods.get("dst_unused") != "UNUSED_PAD":
            raise Fault(f"SDWA {mods}")
        kind, _, n = to_select.partition("_")
        shift = U32(int(n or 0) * (8 if kind == "BYTE" else 16))
        keep = U32({"BYTE": 0xFF, "WORD": 0xFFFF, "DWORD": 0xFFFFFFFF}[kind])

        def run(w):
            w.write(to, (f(*[source(w) for source in sources]) & keep) << shift)

        return run
    if len(sources) == 1:
        (a,) = sources
        return lambda w: w.write(to, f(a(w)))
    if len(sources) == 2:
        a, b = sources
        return lambda w: w.write(to, f(a(w), b(w)))
    a, b, c = sources
    return lambda w: w.write(to, f(a(w), b(w), c(w)))


_SIZES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "short": 2, "byte": 1,
          "ubyte": 1, "ushort": 2}  # fmt: skip


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


def decode_memory(name, ops, mods):
    if name == "ds_swizzle_b32":
        to, data = (register(op)[1] for op in ops)
        found = re.fullmatch(r"swizzle\((SWAP|REVERSE),(\d+)\)", mods.get("offset", ""))
        if not found:
            return None
        n = int(found[2])
        source = LANES ^ (n if found[1] == "SWAP" else n - 1)
        return lambda w: w.write(to, np.where(lanes_of(w.exec)[source], w.v[data][source], U32(0)))
    offset = int(mods.get("offset", "0"), 0)
    if found := re.fullmatch(r"buffer_(load|store)_(\w+)", name):
        data, size, load = register(ops[0])[1], _SIZES[found[2]], found[1] == "load"
        resource, soffset = register(ops[2])[1], scalar_source(ops[3])
        if set(mods) - {"offen", "offset", "nt", "sc0", "sc1"}:
            raise Fault(f"{name} {mods}")
        vaddr = register(ops[1])[1] if "offen" in mods else None

        def run(w):
            base = w.s64(resource)
            if base >> 48 or w.s[resource + 3] != 0x27000:
                raise Fault(f"buffer descriptor {[hex(x) for x in w.s[resource : resource + 4]]}")
            # Raw buffer: what lies past num_records reads zero and is not written.
            at = np.zeros(64, U64) if vaddr is None else u64(w.v[vaddr])
            at = at + U64(offset)
            if (at >> U64(32))[lanes_of(w.exec)].any():
                raise Fault("the offset into a buffer wraps around")
            active = lanes_of(w.exec) & (at + U64(size) <= U64(w.s[resource + 2]))
            addresses = at[active] + U64(base + soffset(w))
            if load:
                put_octets(w, data, w.memory.load(addresses, size), active)
            else:
                w.memory.store(addresses, octets(w, data, size, active))

        return run
    if found := re.fullmatch(r"global_(load|store)_(\w+)", name):
        load, size = found[1] == "load", _SIZES[found[2]]
        data, address, saddr = (ops[0], ops[1], ops[2]) if load else (ops[1], ops[0], ops[2])
        data, address = register(data)[1], register(address)[1]
        base = None if saddr == "off" else register(saddr)[1]

        def run(w):
            active = lanes_of(w.exec)
            if base is None:
                at = u64(w.v[address]) | u64(w.v[address + 1]) << U64(32)
            else:
                at = u64(w.v[address]) + U64(w.s64(base))
            at = (at + U64(offset & FULL))[active]
            if load:
                put_octets(w, data, w.memory.load(at, size), active)
            else:
                w.memory.store(at, octets(w, data, size, active))

        return run
    if name == "ds_bpermute_b32":
        to, address, data = (register(op)[1] for op in ops)

        def run(w):
            source = ((w.v[address].astype(I64) + offset) // 4) % 64
            w.write(to, np.where(lanes_of(w.exec)[source], w.v[data][source], U32(0)))

        return run
    found = re.fullmatch(r"ds_(read|write|add)(2?)(st64)?_([bu])(\d+)", name)
    if not found:
        return None
    how, twice, far, _, bits = found.groups()
    size = int(bits) // 8
    if twice:
        scale = size * (64 if far else 1)
        offsets = [int(mods.get(f"offset{i}", "0"), 0) * scale for i in (0, 1)]
    else:
        offsets = [offset]
    operands = [register(op)[1] for op in ops]
    address = operands[1] if how == "read" else operands[0]
    words = max(1, size // 4)

    def run(w):
        active = lanes_of(w.exec)
        if how == "read":
            values = []
        for i, extra in enumerate(offsets):
            at = w.v[address][active].astype(I64) + extra
            if not len(at):
                if how == "read":
                    return
                continue
            if at.max() + size > len(w.lds.bytes) or (at % min(size, 4)).any():
                raise Fault(f"LDS {at.min()} to {at.max() + size} of {len(w.lds.bytes)}: {name}")
            cells = at[:, None] + np.arange(size)
            new = octets(w, operands[1 + i], size, active) if how == "write" else None
            w.lds.touch(cells, w.number, how, name, new)
            if how == "read":
                values.append(w.lds.bytes[cells])
            elif how == "write":
                w.lds.bytes[cells] = new
            else:
                np.add.at(w.lds.bytes.view(U32), at // 4, w.v[operands[1]][active])
        if how == "read":  # all of it before any register is written: the address may be one
            for i, value in enumerate(values):
                put_octets(w, operands[0] + i * words, value, active)

    return run


CONTROL = {
    "s_branch": lambda w: True,
    "s_cbranch_scc0": lambda w: not w.scc,
    "s_cbranch_scc1": lambda w: w.scc,
    "s_cbranch_vccz": lambda w: w.s64(VCC) == 0,
    "s_cbranch_vccnz": lambda w: w.s64(VCC) != 0,
    "s_cbranch_execz": lambda w: w.exec == 0,
    "s_cbranch_execnz": lambda w: w.exec != 0,
}
IGNORED = {"s_nop", "s_waitcnt", "s_waitcnt_depctr", "s_sleep", "s_setprio", "s_code_end"}


def decode(text: str) -> Instruction:
    """One line of assembly. Raises Fault, naming it, where it is not known."""
    name, _, rest = text.partition(" ")
    if name in CONTROL:
        return Instruction(name, text, CONTROL[name])
    if name in IGNORED or name in ("s_barrier", "s_endpgm"):
        return Instruction(name, text, None)
    ops, mods = split(rest.strip())
    base, suffix = name, ""
    if found := re.fullmatch(r"(v_\w+?)_(e32|e64|dpp|sdwa)", name):
        base, suffix = found.groups()
    run = (
        decode_scalar(base, ops, mods) if base.startswith("s_")
        else decode_vector(base, ops, mods, suffix) if base.startswith("v_")
        else decode_memory(base, ops, mods)
    )  # fmt: skip
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
        code, targets, ran = self.code, self.targets, self.ran
        pc = w.pc
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
                elif one.name == "s_barrier":
                    return False
                elif one.name == "s_endpgm":
                    return True
        except Fault as fault:
            raise Fault(f"wave {w.number}, {one.text.strip()}: {fault}") from None
        finally:
            w.pc = pc


def launch(
    program: Program, grid: int, waves: int, kernarg: bytes, tensors, lds: int, *,
    user_sgprs: int = 2, preload: int = 0, entry: int = 0, seed: int = 0, limit: int = 20_000_000,
) -> int:  # fmt: skip
    """Run `grid` workgroups of `waves` waves, in an order that `seed` picks; the instructions run.

    tensors: (address, uint8 array) of each buffer. user_sgprs: scalar registers before the one with
    the workgroup's number. preload: words of the kernel arguments that are in them when the kernel
    starts, at instruction `entry`.
    """
    memory = Memory()
    arguments = np.frombuffer(kernarg, np.uint8).copy()
    memory.add(arguments.ctypes.data, arguments)
    for base, data in tensors:
        memory.add(base, data)
    rng = np.random.default_rng(seed)
    count = 0
    with np.errstate(over="ignore"):
        for group in rng.permutation(grid):
            shared = Lds(max(lds, 4), waves, rng)
            all_waves = []
            for number in range(waves):
                w = Wave(number, memory, shared, rng)
                w.s[0], w.s[1] = arguments.ctypes.data & 0xFFFFFFFF, arguments.ctypes.data >> 32
                for i in range(preload):
                    w.s[2 + i] = struct.unpack_from("<I", kernarg, 4 * i)[0]
                w.s[user_sgprs] = int(group)
                w.v[0] = number * 64 + LANES
                w.pc = entry
                all_waves.append(w)
            waiting = all_waves
            while waiting:
                ended = [program.run_wave(waiting[i], limit) for i in rng.permutation(len(waiting))]
                if any(ended) and not all(ended):
                    raise Fault("a wave ended while others wait at a barrier")
                shared.barrier()
                waiting = [] if all(ended) else waiting
            count += sum(w.count for w in all_waves)
    return count
