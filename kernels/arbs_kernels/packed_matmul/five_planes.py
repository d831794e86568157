"""How codes become trits on the halves of registers, and PTX that turns four codes into twenty of them.

Halves of a register hold `64 f` of two codes, `f` being the fraction of which the code is the first: three times that
is a digit in the two highest bits and the next fraction in the eight below. A digit less one, there, is two times a
trit: 0xC000 is -2 and 0x4000 is 2, in half precision and in bfloat16 alike. What the lower half carries into the upper
one stays below its fraction.
"""

DIGITS = 0xC000C000
"""Where the digits are; and what makes each one less when it is added."""
FRACTIONS = 0x3FC03FC0
"""Where the next fractions are."""
FACTORS = (3 * 64, 3, 3, 3, 3)
"""What each plane multiplies by, the first one codes as they are."""


def _planes_of_pair(pair: str, half: int, subtracted: tuple[int, ...]) -> str:
    """From two codes, two times each trit, lowest plane first.

    The next fraction is what is left without the digit: by a mask, or by a difference in planes that are `subtracted`,
    of which no more than three may follow each other, for what was carried is left then, too, and grows.
    """
    code = []
    for plane in range(5):
        code.append(f"mad.lo.u32 {pair}, {pair}, {FACTORS[plane]}, less;")
        code.append(f"and.b32 ${2 * plane + half}, {pair}, {DIGITS:#x};")
        if plane in subtracted:
            code.append(f"sub.u32 {pair}, {pair}, ${2 * plane + half};")
        elif plane < 4:
            code.append(f"and.b32 {pair}, {pair}, {FRACTIONS:#x};")
    return " ".join(code)


def _five_planes(subtracted: tuple[int, ...] = ()) -> str:
    registers = f"{{ .reg .b32 a, b, less; mov.b32 less, {DIGITS:#x}; "
    pairs = "prmt.b32 a, $10, 0, 0x4140; prmt.b32 b, $10, 0, 0x4342; "
    return registers + pairs + _planes_of_pair("a", 0, subtracted) + " " + _planes_of_pair("b", 1, subtracted) + " }"


FIVE_PLANES = _five_planes()
"""From four codes in $10, lowest column first, two times each trit in half precision and in bfloat16 alike: those of
the lower two codes in plane `i` in `$(2i)`, of the upper two in `$(2i + 1)`."""
FIVE_PLANES_BY_DIFFERENCES = _five_planes(subtracted=(0, 1, 3))
"""The same for a kernel that multiplies little besides: masks and integer products leave by turns, each every other
cycle, and the compiler makes a difference of a product."""
