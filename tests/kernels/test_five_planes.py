"""The PTX that decodes four codes at once, carried out on the CPU for every pair of codes."""

import re

import numpy as np
import pytest

from arbs_kernels.packed_matmul import five_planes


def carried_out(code: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Registers after `code`, of unsigned 32-bit words; every instruction that it may have is here."""
    registers = dict(given)

    def value(operand: str) -> np.ndarray:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))

    for line in code.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, *operands = re.findall(r"[\w.$]+", line)
        into, *of = operands[0], *(value(operand) for operand in operands[1:])
        match name:
            case "mov.b32":
                registers[into] = of[0]
            case "mad.lo.u32":
                registers[into] = of[0] * of[1] + of[2]
            case "and.b32":
                registers[into] = of[0] & of[1]
            case "sub.u32":
                registers[into] = of[0] - of[1]
            case "prmt.b32":
                low, high, selector = of
                pool = [low >> np.uint32(8 * i) & np.uint32(255) for i in range(4)]
                pool += [high >> np.uint32(8 * i) & np.uint32(255) for i in range(4)]
                places = [int(selector) >> 4 * i & 7 for i in range(4)]
                registers[into] = sum((pool[place] << np.uint32(8 * i) for i, place in enumerate(places)), np.uint32(0))
            case _:
                raise AssertionError(f"no such instruction here: {line}")
    return registers


@pytest.mark.parametrize("name", ["FIVE_PLANES", "FIVE_PLANES_BY_DIFFERENCES"])
def test_every_pair_of_codes(name):
    """Any byte decodes, also those that no trits are packed into, whatever lies beside it."""
    lower, upper = (codes.reshape(-1).astype(np.uint32) for codes in np.meshgrid(np.arange(256), np.arange(256)))
    first, second = lower | upper << np.uint32(8), upper | lower << np.uint32(8)
    got = carried_out(getattr(five_planes, name), {"$10": first | second << np.uint32(16)})
    halves = {0xC000: -1, 0: 0, 0x4000: 1}
    for plane in range(5):
        for half, codes in enumerate(((lower, upper), (upper, lower))):
            word = got[f"${2 * plane + half}"]
            for place, code in enumerate(codes):
                trit = (code * 3**plane % 256 * 3 >> 8).astype(np.int64) - 1
                found = word >> np.uint32(16 * place) & np.uint32(0xFFFF)
                assert set(np.unique(found)) == set(halves)
                np.testing.assert_array_equal(np.vectorize(halves.get)(found), trit)
