"""PTX that turns four codes into twenty trits on the halves of registers, for whoever writes kernels with it."""


def _planes_of_pair(pair: str, half: int, subtracted: tuple[int, ...]) -> str:
    """From two codes, two times each trit, lowest plane first.

    `pair` holds `64 f` in each half of a register, `f` being the fraction of which the code is the first: three times
    that is a digit in the two highest bits and the next fraction in the eight below. A digit less one, there, is two
    times a trit: 0xC000 is -2 and 0x4000 is 2, in half precision and in bfloat16 alike. The next fraction is what is
    left without the digit: by a mask, or by a difference in planes that are `subtracted`. What the lower half carries
    into the upper one stays below its fraction, if no more than three differences follow each other.
    """
    code = []
    for plane in range(5):
        code.append(f"mad.lo.u32 {pair}, {pair}, {192 if plane == 0 else 3}, less;")
        code.append(f"and.b32 ${2 * plane + half}, {pair}, 0xC000C000;")
        if plane in subtracted:
            code.append(f"sub.u32 {pair}, {pair}, ${2 * plane + half};")
        elif plane < 4:
            code.append(f"and.b32 {pair}, {pair}, 0x3FC03FC0;")
    return " ".join(code)


def _five_planes(low: tuple[str, str], high: tuple[str, str], subtracted: tuple[int, ...] = ()) -> str:
    """With the code of both pairs: the registers where they are, and the bytes of those."""
    registers = "{ .reg .b32 a, b, less; mov.b32 less, 0xC000C000; "
    pairs = "".join(
        f"prmt.b32 {name}, {register}, 0, {which}; " for name, (register, which) in zip("ab", (low, high), strict=True)
    )
    return registers + pairs + _planes_of_pair("a", 0, subtracted) + " " + _planes_of_pair("b", 1, subtracted) + " }"


FIVE_PLANES = _five_planes(("$10", "0x4140"), ("$10", "0x4342"))
"""From four codes in $10, lowest column first, two times each trit in half precision and in bfloat16 alike: those of
the lower two codes in plane `i` in `$(2i)`, of the upper two in `$(2i + 1)`."""
FIVE_PLANES_BY_DIFFERENCES = _five_planes(("$10", "0x4140"), ("$10", "0x4342"), subtracted=(0, 1, 3))
"""The same for a kernel that multiplies little besides: masks and integer products leave by turns, each every other
cycle, and the compiler makes a difference of a product."""
FIVE_PLANES_OF_PAIRS = _five_planes(("$10", "0x4140"), ("$11", "0x4140"))
"""The same of the two codes in the lower half of $10, and the two of $11."""
