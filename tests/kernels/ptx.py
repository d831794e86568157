"""Straight-line PTX run by NumPy, an instruction at a time, on as many threads as its inputs are long."""

import numpy as np


def run(code: str, inputs: dict[str, np.ndarray], outputs: int) -> list[np.ndarray]:
    """Registers `$0` to `$(outputs-1)` after `code`, of uint32 arrays by the names of their registers."""
    registers = dict(inputs)

    def value(word: str) -> np.ndarray:
        return registers[word] if word in registers else np.uint32(int(word, 0))

    def permuted(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
        eight = [low >> np.uint32(8 * at) & 255 for at in range(4)] + [
            high >> np.uint32(8 * at) & 255 for at in range(4)
        ]
        return sum(eight[int(selector) >> 4 * at & 7] << np.uint32(8 * at) for at in range(4))

    def funnel(low: np.ndarray, high: np.ndarray, shift: np.ndarray) -> np.ndarray:
        both = high.astype(np.uint64) << np.uint64(32) | low
        return (both >> (shift & np.uint32(31)).astype(np.uint64)).astype(np.uint32)

    operations = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "mul.lo.u32": lambda a, b: a * b,
        "mad.lo.u32": lambda a, b, c: a * b + c,
        "prmt.b32": permuted,
        "shf.r.wrap.b32": funnel,
    }
    for line in code.strip("{ }").split(";"):
        name, _, words = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *given = (word.strip() for word in words.split(","))
        registers[target] = operations[name](*map(value, given))
    return [registers[f"${index}"] for index in range(outputs)]
