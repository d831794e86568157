"""PTX that turns four codes into twenty trits on the halves of registers, for whoever writes kernels with it."""

import numpy as np


def _halves(value: float) -> str:
    """A half-precision number in both halves of a register."""
    return f"0x{int(np.float16(value).view(np.uint16)) * 0x10001:08X}"


def _planes_of_pair(pair: str, half: int) -> str:
    """From two codes, the half-precision numbers `1024 + code`: two times each trit, lowest plane first.

    Numbers between 2^11 and 2^12 are the even ones: sums round to `u_i = 2 (I_i + b_i)`. With `b_i = 3 b_(i-1) - 2048`
    no sum here leaves the even numbers up to 2^12 in size, so all others are exact. Two is written alike in
    half precision and in bfloat16.
    """
    code = []
    base = 1026
    for plane in range(5):
        u, last, power = f"u{plane % 2}", f"u{1 - plane % 2}", 3 ** (plane + 1)
        code.append(f"mov.b32 k, {_halves(power / 128)}; mov.b32 l, {_halves(2 * base - 1 - 8 * power)};")
        code.append(f"fma.rn.f16x2 {u}, {pair}, k, l;")
        if plane == 0:
            code.append(f"mov.b32 {last}, {_halves(-2 * base - 2)};")
        else:
            code.append(f"mov.b32 k, {_halves(-3)}; mov.b32 l, {_halves(4094)}; fma.rn.f16x2 {last}, {last}, k, l;")
        code.append(f"add.rn.f16x2 ${2 * plane + half}, {u}, {last};")
        base = 3 * base - 2048
    return " ".join(code)


def _five_planes(low: str, high: str) -> str:
    """With the code of both pairs: the registers where they are, and the bytes of those."""
    registers = "{ .reg .b32 a, b, k, l, u0, u1; "
    pairs = "".join(f"prmt.b32 {name}, {at}; " for name, at in (("a", low), ("b", high)))
    return registers + pairs + _planes_of_pair("a", 0) + " " + _planes_of_pair("b", 1) + " }"


FIVE_PLANES = _five_planes("$10, 0x64646464, 0x4140", "$10, 0x64646464, 0x4342")
"""From four codes in $10, lowest column first, two times each trit in half precision and in bfloat16 alike: those of
the lower two codes in plane `i` in `$(2i)`, of the upper two in `$(2i + 1)`."""
FIVE_PLANES_OF_PAIRS = _five_planes("$10, 0x64646464, 0x4140", "$11, 0x64646464, 0x4140")
"""The same of the two codes in the lower half of $10, and the two of $11."""
