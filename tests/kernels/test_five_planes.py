"""The PTX that decodes codes, run here instruction by instruction on all pairs of codes at once."""

import numpy as np
import pytest
from ptx import run

from arbs_kernels.packed_matmul.five_planes import FIVE_PLANES, FIVE_PLANES_OF_PAIRS


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
        found = run(FIVE_PLANES, {"$10": pair | second << 16 | first << 24}, 10)
    else:
        found = run(FIVE_PLANES_OF_PAIRS, {"$10": pair, "$11": second | first << 8}, 10)
    halves = np.stack([np.stack([part & 0xFFFF, part >> 16]) for part in found]).astype(np.uint16)
    lower, upper = halves[0::2].view(np.float16), halves[1::2].view(np.float16)
    np.testing.assert_array_equal(lower, np.stack([twice_the_trits(first), twice_the_trits(second)], axis=1))
    np.testing.assert_array_equal(upper, lower[:, ::-1])
    assert set(np.unique(halves)) == {0x0000, 0x4000, 0xC000}
