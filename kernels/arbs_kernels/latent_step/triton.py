"""One step of integer latents by a Triton kernel: the direction is read once, the latents are read and written packed.

A thread takes a byte of every plane: five columns' latents of up to five digits each, with nothing to exchange but what
is counted of a row.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels import latents
from arbs_kernels.latent_step.reference import LARGEST
from arbs_kernels.packed_decode.triton import power_of_plane, trit_of
from arbs_kernels.triton_launch import in_one_launch, launch
from arbs_kernels.triton_noise import of_columns, of_rows, unit

_LARGEST = tl.constexpr(LARGEST)
_COUNT_BITS = tl.constexpr(10)
"""Of each of the three counts that a program makes of a row, in one int32."""
_WIDTH = 128
"""Bytes of a program's rows; their columns are fewer than `_COUNT_BITS` count."""


@triton.jit
def _step(
    direction_ptr,
    trits_ptr,
    residual_ptr,
    floats_ptr,
    words_ptr,
    trits_out,
    residual_out,
    counts_out,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PLANES: tl.constexpr,
    HALF: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    matrix = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(0) * BYTES + tl.arange(0, BYTES)[None, :]
    norm, rate = tl.load(floats_ptr + 2 * matrix), tl.load(floats_ptr + 2 * matrix + 1)
    seed, offset = tl.load(words_ptr + 2 * matrix), tl.load(words_ptr + 2 * matrix + 1)
    inside = (rows < N) & (at < P)
    place = rows.to(tl.int64) * P + at
    row_hash = of_rows(rows, seed)
    # The latents of the five columns, leading plane first.
    codes = (tl.load(trits_ptr + matrix * (N * P) + place, mask=inside, other=0),)
    for plane in tl.static_range(PLANES - 1):
        lower = residual_ptr + (matrix * (PLANES - 1) + plane) * (N * P)
        codes = codes + (tl.load(lower + place, mask=inside, other=0),)  # noqa: RUF005 (Triton knows no stars)
    values = (tl.zeros((ROWS, BYTES), tl.int32),) * PLANES
    counts = tl.zeros((ROWS, BYTES), tl.int32)
    for i in tl.static_range(5):
        columns = i * P + at
        v = tl.zeros((ROWS, BYTES), tl.int32)
        for plane in tl.static_range(PLANES):
            v = v * 3 + trit_of(codes[plane], power_of_plane(i))
        before = trit_of(codes[0], power_of_plane(i))
        valid = inside & (columns < K)
        d = tl.load(direction_ptr + matrix * (N * K) + rows.to(tl.int64) * K + columns, mask=valid, other=0.0)
        d = d.to(tl.float32)
        if POWER == 2.0:
            d = d * tl.abs(d) / norm
        elif POWER != 1.0:
            size = norm * tl.exp2(POWER * tl.log2(tl.abs(d) / norm))
            d = tl.where(d > 0, size, tl.where(d < 0, -size, 0.0))
        d = tl.minimum(tl.maximum(d, -_LARGEST), _LARGEST)
        change = tl.floor(-rate * d + unit(of_columns(row_hash, columns) + offset)).to(tl.int32)
        v = tl.minimum(tl.maximum(v + tl.where(rate == 0, 0, change), -HALF), HALF)
        # Digits of v + HALF in base 3 are the trits plus one; what packing pads holds the trit 0.
        rest = tl.where(columns < K, v, 0) + HALF
        moved = ()
        for lowest in tl.static_range(PLANES):
            above = rest * 21846 >> 16  # rest // 3
            moved = (values[PLANES - 1 - lowest] * 3 + rest - 3 * above,) + moved  # noqa: RUF005
            rest = above
        values = moved
        now = (v > HALF // 3).to(tl.int32) - (v < -(HALF // 3)).to(tl.int32)
        flipped = (now != before).to(tl.int32)
        zero = (now == 0).to(tl.int32) << _COUNT_BITS
        end = ((v == HALF) | (v == -HALF)).to(tl.int32) << 2 * _COUNT_BITS
        counts += tl.where(valid, flipped | zero | end, 0)
    for plane in tl.static_range(PLANES):
        code = (values[plane] * 256 + 242) // 243
        if plane == 0:
            tl.store(trits_out + matrix * (N * P) + place, code.to(tl.uint8), mask=inside)
        else:
            lower = residual_out + (matrix * (PLANES - 1) + plane - 1) * (N * P)
            tl.store(lower + place, code.to(tl.uint8), mask=inside)
    line = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    whole = (matrix * N + line) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts_out + whole, tl.sum(counts, axis=1), mask=line < N)


def step(
    direction: jax.Array,
    trits: jax.Array,
    residual: jax.Array,
    norm: jax.Array,
    rate: jax.Array,
    seed: jax.Array,
    offset: jax.Array,
    *,
    power: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.latent_step`."""
    return in_one_launch(_launched, direction, trits, residual, norm, rate, seed, offset, power=power)


def _launched(direction, trits, residual, norm, rate, seed, offset, *, power: float, rows: int = 4):
    stack, N, K = direction.shape
    P, planes = trits.shape[-1], residual.shape[1] + 1
    # One plane has no residual: its pointer is never followed, but there is no such thing as one to nothing.
    lower = residual if planes > 1 else trits
    parts = triton.cdiv(P, _WIDTH)
    results = (trits.shape, trits.dtype), (lower.shape, lower.dtype), ((stack, N, parts), jnp.int32)
    trits, lower, packed = launch(
        _step,
        direction,
        trits,
        lower,
        jnp.stack([norm, rate], axis=-1).astype(jnp.float32),
        jnp.stack([seed, offset], axis=-1),
        out=tuple(jax.ShapeDtypeStruct(*result) for result in results),
        num_warps=4,
        num_stages=1,
        grid=(parts, triton.cdiv(N, rows), stack),
        N=N,
        K=K,
        P=P,
        PLANES=planes,
        HALF=latents.half_range(planes),
        POWER=power,
        ROWS=rows,
        BYTES=_WIDTH,
    )
    each = jnp.stack([packed >> _COUNT_BITS.value * count for count in range(3)], axis=-1) % 2**_COUNT_BITS.value
    return trits, lower if planes > 1 else residual, jnp.sum(each, axis=2)
