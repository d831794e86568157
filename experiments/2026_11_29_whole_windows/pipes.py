"""Cycles that one of a multiprocessor's four schedulers takes for an instruction of a warp, alone and among others.

    python experiments/2026_11_29_whole_windows/pipes.py

Each body repeats its instructions on registers that depend on each other as little as possible; a loop of it adds some
60 instructions, most of which are masks. Times are of one warp and of four warps that share a scheduler, by a cycle
counter before the loop and after.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from arbs_kernels.triton_launch import launch

LOOPS = 200
REGISTERS = [f"r{index}" for index in range(12)]
SUMS = [f"f{index}" for index in range(16)]
SMS = 132


def register(index: int) -> str:
    """One of eight that are written."""
    return REGISTERS[index % 8]


def lop3(index: int) -> str:
    """A mask of two registers and a constant."""
    return (
        f"lop3.b32 {register(index)}, {register(index)}, {0x7A3F1101 + index * 0x1357:#x}, {register(index + 1)}, 0x96;"
    )


def mad(index: int) -> str:
    """An integer product of three registers."""
    return f"mad.lo.u32 {register(index)}, {register(index)}, {REGISTERS[9 + index % 3]}, {register(index + 1)};"


def prmt(index: int) -> str:
    """A permutation of bytes."""
    return (
        f"prmt.b32 {register(index)}, {register(index)}, {REGISTERS[8 + index % 4]}, 0x{(0x5140, 0x3726)[index % 2]:x};"
    )


def fma(index: int) -> str:
    """A float32 product of three registers."""
    return f"fma.rn.f32 {register(index)}, {register(index)}, {REGISTERS[8 + index % 4]}, {register(index + 3)};"


def fma_of_two(index: int) -> str:
    """The same of two."""
    return f"fma.rn.f32 {register(index)}, {register(index)}, r8, {register(index)};"


def mma(index: int, kind: str = "m16n8k16.row.col.f32.bf16.bf16.f32") -> str:
    """A tensor core's product, four sets of sums by turns."""
    sums = ", ".join(SUMS[4 * (index % 4) : 4 * (index % 4) + 4])
    return f"mma.sync.aligned.{kind} {{{sums}}}, {{r8, r9, r10, r11}}, {{r8, r9}}, {{{sums}}};"


def mixed(every: int) -> Callable[[int], str]:
    """Masks and integer products by turns, and each so many instructions one of the tensor core."""

    def body(index: int) -> str:
        if index % every == every - 1:
            return mma(index // every)
        return (mad, lop3)[index % every % 2](index)

    return body


BODIES: dict[str, tuple[int, Callable[[int], str]]] = {
    "lop3": (192, lop3),
    "mad": (192, mad),
    "prmt": (192, prmt),
    "fma": (192, fma),
    "fma of two registers": (192, fma_of_two),
    "lop3, mad": (192, lambda index: (mad, lop3)[index % 2](index)),
    "lop3, fma": (192, lambda index: (fma, lop3)[index % 2](index)),
    "mma bfloat16": (64, mma),
    "mma int8": (64, lambda index: mma(index, "m16n8k32.row.col.s32.u8.s8.s32")),
    "lop3, mad, 1 mma of 32": (192, mixed(32)),
    "lop3, mad, 1 mma of 16": (192, mixed(16)),
    "lop3, mad, 1 mma of 8": (192, mixed(8)),
}
KERNEL = """
_BODY_{number} = tl.constexpr("{code}")


@triton.jit
def body_{number}(x_ptr, y_ptr, t_ptr, LOOPS: tl.constexpr, WARPS: tl.constexpr):
    thread = tl.arange(0, 32 * WARPS)
    v = tl.load(x_ptr + thread)
    start = tl.inline_asm_elementwise(_CLOCK, "=&l,l", [v.to(tl.int64)], tl.int64, is_pure=False, pack=1)
    for _ in range(LOOPS):
        v = tl.inline_asm_elementwise(_BODY_{number}, "=&r,r", [v], tl.int32, is_pure=False, pack=1)
    end = tl.inline_asm_elementwise(_CLOCK, "=&l,l", [v.to(tl.int64)], tl.int64, is_pure=False, pack=1)
    place = tl.program_id(0) * (32 * WARPS) + thread
    tl.store(y_ptr + place, v)
    tl.store(t_ptr + place, end - v.to(tl.int64) - start + tl.load(x_ptr + thread).to(tl.int64))
"""


def code_of(count: int, body: Callable[[int], str]) -> str:
    """A body that takes and gives one register."""
    names = [*REGISTERS, *SUMS]
    begin = " ".join(f"add.u32 {name}, $1, {77 * index + 1};" for index, name in enumerate(names))
    end = " ".join(f"xor.b32 r0, r0, {name};" for name in names[1:])
    middle = " ".join(body(index) for index in range(count))
    return f"{{ .reg .b32 {', '.join(names)}; {begin} {middle} {end} mov.b32 $0, r0; }}"


def main() -> None:
    """A line each."""
    jax.config.update("jax_enable_x64", True)  # cycles are 64 bits
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    text = "import triton\nimport triton.language as tl\n\n"
    text += '_CLOCK = tl.constexpr("mov.u64 $0, %clock64; add.s64 $0, $0, $1;")\n'
    for number, (count, body) in enumerate(BODIES.values()):
        text += KERNEL.format(number=number, code=code_of(count, body))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bodies.py").write_text(text)
        sys.path.insert(0, folder)
        kernels = importlib.import_module("bodies")
        for number, (name, (count, _)) in enumerate(BODIES.items()):
            cycles = []
            for warps in (4, 16):
                places = SMS * 32 * warps

                def run(
                    x: jax.Array, warps: int = warps, places: int = places, number: int = number
                ) -> list[jax.Array]:
                    out = (jax.ShapeDtypeStruct((places,), "int32"), jax.ShapeDtypeStruct((places,), "int64"))
                    kernel = getattr(kernels, f"body_{number}")
                    sizes = {"num_warps": warps, "num_stages": 1, "LOOPS": LOOPS, "WARPS": warps}
                    return launch(kernel, x, out=out, grid=(SMS,), **sizes)

                x, timed = jnp.zeros(32 * warps, jnp.int32), jax.jit(run)
                jax.block_until_ready(timed(x))
                cycles.append(np.median(np.asarray(timed(x)[1])) / LOOPS / (warps // 4))
            print(
                f"{name:<24s} {count} instructions: one warp {cycles[0]:6.1f} cycles, each of four {cycles[1]:6.1f},"
                f" an instruction {cycles[1] / count:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
