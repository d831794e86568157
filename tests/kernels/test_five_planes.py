"""The PTX that decodes codes, run here instruction by instruction on all pairs of codes at once."""

import numpy as np
import pytest

from arbs_kernels.packed_matmul.five_planes import FIVE_PLANES, FIVE_PLANES_OF_PAIRS


def run(code: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """Registers $0 to $9 after `code`, of the inputs $10, $11; uint32 arrays."""
    registers = {f"${10 + index}": value for index, value in enumerate(inputs)}

    def value(word: str) -> np.ndarray:
        return registers[word] if word in registers else np.uint32(int(word, 0))

    def permuted(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
        eight = [low >> np.uint32(8 * at) & 255 for at in range(4)] + [
            high >> np.uint32(8 * at) & 255 for at in range(4)
        ]
        return sum(eight[int(selector) >> 4 * at & 7] << np.uint32(8 * at) for at in range(4))

    operations = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "mad.lo.u32": lambda a, b, c: a * b + c,
        "prmt.b32": permuted,
    }
    for line in code.strip("{ }").split(";"):
        name, _, words = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *given = (word.strip() for word in words.split(","))
        registers[target] = operations[name](*map(value, given))
    return [registers[f"${index}"] for index in range(10)]


def twice_the_trits(code: np.ndarray) -> np.ndarray:
    """Of five planes, by the definition of a code: digits of the fraction that it begins."""
    fractions = [code.astype(np.int64) * 3**plane % 256 for plane in range(5)]
    return np.stack([2 * (fraction * 3 // 256 - 1) for fraction in fractions])


@pytest.mark.parametrize("word_holds_four", [True, False])
def test_all_pairs_of_codes(word_holds_four: bool):
    """Neighbours in a register do not disturb each other; two is written alike in half precision and in bfloat16."""
    first, second = (codes.astype(np.uint32) for codes in np.divmod(np.arange(2**16), 256))
    pair = first | second << 8
    if word_holds_four:  # The other pair the other way round.
        found = run(FIVE_PLANES, pair | second << 16 | first << 24)
    else:
        found = run(FIVE_PLANES_OF_PAIRS, pair, second | first << 8)
    halves = np.stack([np.stack([part & 0xFFFF, part >> 16]) for part in found]).astype(np.uint16)
    lower, upper = halves[0::2].view(np.float16), halves[1::2].view(np.float16)
    np.testing.assert_array_equal(lower, np.stack([twice_the_trits(first), twice_the_trits(second)], axis=1))
    np.testing.assert_array_equal(upper, lower[:, ::-1])
    assert set(np.unique(halves)) == {0x0000, 0x4000, 0xC000}
