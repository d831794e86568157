"""Instructions a weight costs between its packed byte and the tensor core, counted in compiled Triton kernels.

    python instructions.py

Needs triton 3.6 and no GPU: kernels are compiled for sm_80 and sm_90 and disassembled. A kernel multiplies a few rows
by a packed matrix, weights as the first operand; each plane of a tile of bytes is one product.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@triton.jit
def plain(codes):
    """Five planes of trits of bytes, one number at a time."""
    w = codes.to(tl.int32)
    return (
        (((w & 255) * 3 >> 8) - 1).to(tl.bfloat16),
        (((w * 3 & 255) * 3 >> 8) - 1).to(tl.bfloat16),
        (((w * 9 & 255) * 3 >> 8) - 1).to(tl.bfloat16),
        (((w * 27 & 255) * 3 >> 8) - 1).to(tl.bfloat16),
        (((w * 81 & 255) * 3 >> 8) - 1).to(tl.bfloat16),
    )


def assembly(digit: str) -> tl.constexpr:
    """PTX from four bytes to five planes of `2 + digit/2`, two numbers to a register; `digit` puts the digit of `t` in
    the mantissa's top bits, so that nothing is converted."""
    lines = [".reg .b32 a, b, t;", "prmt.b32 a, $10, 0, 0x4140;", "prmt.b32 b, $10, 0, 0x4342;"]
    for plane in range(5):
        for half, pair in enumerate("ab"):
            fraction = f"mul.lo.u32 t, {pair}, {3**plane}; and.b32 t, t, 0x00FF00FF; mul.lo.u32 t, t, 3;"
            first = f"mul.lo.u32 t, {pair}, 3;"
            lines.append(f"{fraction if plane else first} {digit.format(f'${2 * plane + half}')}")
    return tl.constexpr("{ " + "\n".join(lines) + " }")


BFLOAT16 = assembly("shr.u32 t, t, 3; lop3.b32 {}, t, 0x00600060, 0x40004000, 0xEA;")
FLOAT16 = assembly("lop3.b32 {}, t, 0x03000300, 0x40004000, 0xEA;")


@triton.jit
def pairs_bfloat16(codes):
    """Five planes of `2 + digit/2`."""
    return tl.inline_asm_elementwise(
        BFLOAT16,
        "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r",
        [codes],
        (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def pairs_float16(codes):
    """As in bfloat16; the digit already lies at the mantissa's top and needs no shift."""
    return tl.inline_asm_elementwise(
        FLOAT16,
        "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r",
        [codes],
        (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def matmul(
    x_ptr,
    trits_ptr,
    scale_ptr,
    y_ptr,
    N,
    K,
    P,
    R,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE: tl.constexpr,
):
    """`y^T += W x^T` over one of SPLIT parts of the bytes; a tile of bytes lies in one group in every plane."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.arange(0, M)
    total = tl.zeros((ROWS, M), tl.float32)
    for first in range(tl.program_id(1) * BYTES, P, BYTES * SPLIT):
        at = first + tl.arange(0, BYTES)
        codes = tl.load(trits_ptr + rows[:, None] * P + at[None, :])
        if DECODE == "plain":
            digits = plain(codes)
        elif DECODE == "bfloat16":
            digits = pairs_bfloat16(codes)
        else:
            digits = pairs_float16(codes)
        for plane in tl.static_range(5):
            scale = tl.load(scale_ptr + rows * R + (plane * P + first) // G)
            x = tl.load(x_ptr + batch[None, :] * K + (plane * P + at)[:, None])
            if DECODE == "plain":
                total = tl.dot(digits[plane] * scale.to(tl.bfloat16)[:, None], x, total)
            elif DECODE == "bfloat16":
                total = tl.dot((digits[plane] - 2.5) * (2 * scale).to(tl.bfloat16)[:, None], x, total)
            else:
                total += tl.dot(digits[plane] - 2.5, x) * (2 * scale)[:, None]
    tl.atomic_add(y_ptr + batch[None, :] * N + rows[:, None], total)


def loop_instructions(decode: str, capability: int, rows: int, codes: int) -> Counter[str]:
    """Instructions of the kernel's main loop by name, for one thread and turn."""
    kinds = {"x_ptr": "*fp16" if decode == "float16" else "*bf16", "trits_ptr": "*u8", "scale_ptr": "*fp32"}
    signature = kinds | {"y_ptr": "*fp32"} | dict.fromkeys("NKPR", "i32")
    constants = {"G": 256, "ROWS": rows, "BYTES": codes, "M": 16, "SPLIT": 4, "DECODE": decode}
    names = [*signature, *constants]
    source = ASTSource(
        matmul,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in signature if name != "R"},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 3})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return Counter(name.split(".")[0] for name in main_loop(listing.stdout.splitlines()))


def main_loop(lines: list[str]) -> list[str]:
    """Instruction names between a label and the farthest jump back to it."""
    labels = {match.group(1): at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_\w+):", line))}
    jumps = [
        (at, labels.get(match.group(1), at))
        for at, line in enumerate(lines)
        if (match := re.search(r"BRA.*`\((\.L_\w+)\)", line))
    ]
    end, start = max(jumps, key=lambda jump: jump[0] - jump[1])
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z0-9_.]+)", "\n".join(lines[start : end + 1]))


def main() -> None:
    """Compiles and prints."""
    for decode in ("plain", "bfloat16", "float16"):
        for capability in (90, 80):
            for rows, codes in ((64, 64), (128, 64), (64, 128)):
                found = loop_instructions(decode, capability, rows, codes)
                weights = rows * codes * 5 / 128
                most = ", ".join(f"{name} {count / weights:.2f}" for name, count in found.most_common(6))
                print(f"{decode:8s} sm_{capability} {rows:3d} x {codes:3d}: {found.total() / weights:5.2f}; {most}")


if __name__ == "__main__":
    main()
