"""Five trits in a byte: the in-memory row layout and the flat interchange form.

In memory (`uint8 (..., N, P)`, `P = packed_width(K)`) every row starts on a byte, a long row on a multiple of 32, and
its digits are *planar*: byte `j` of a row holds columns `j, j+P, j+2P, j+3P, j+4P`, so that unpacking is five
contiguous planes laid side by side and no digit has to be interleaved. With digits `d_i = trit + 1` and `d_0` the
lowest column, the base-3 value `v = sum d_i 3^(4-i)` in [0, 243) is stored as the fixed-point fraction
`ceil(v * 256 / 243)`. Digit `i` is then the integer part of `3 * frac(code * 3^i / 256)`: two multiplies, a mask and a
shift, with no division and no dependence between digits. Columns at or past `K` hold the trit 0, which adds nothing to
a product.

The interchange form is the one other systems read and write: `byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4` over the
row-major matrix flattened (rows run into each other when K % 5 != 0), padding digits 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

TRITS_PER_BYTE = 5
LONG_ROW = 2048
"""Columns from which on rows are filled up to a multiple of `ROW_UNIT` bytes, so that wide loads find them aligned."""
ROW_UNIT = 32
_PLACE_VALUES = (81, 27, 9, 3, 1)


def packed_width(in_features: int) -> int:
    """Bytes in one packed row, `P`: `ceil(K/5)`, of a long row up to a multiple of 32."""
    width = _bytes_of(in_features)
    return -(-width // ROW_UNIT) * ROW_UNIT if in_features >= LONG_ROW else width


def _bytes_of(trits: int) -> int:
    return -(-trits // TRITS_PER_BYTE)


def pack_rows(trits: jax.Array) -> jax.Array:
    """Packs `int8 (..., N, K)` trits in {-1, 0, 1} into `uint8 (..., N, P)`. Values outside that set are not checked.

    Raises:
        ValueError: `trits` has fewer than two axes or an axis of size 0.
    """
    if trits.ndim < 2 or 0 in trits.shape:
        raise ValueError(f"trits must have at least two non-empty axes (N, K), got shape {trits.shape}")
    return pack_planes(split_planes(trits))


def unpack_rows(packed: jax.Array, in_features: int) -> jax.Array:
    """Unpacks `uint8 (..., N, P)` into `int8 (..., N, K)` trits.

    Raises:
        ValueError: the last axis of `packed` is not `packed_width(in_features)` bytes.
    """
    width = packed_width(in_features)
    if packed.shape[-1] != width:
        raise ValueError(
            f"packed rows of {in_features} columns need {width} bytes, got {packed.shape[-1]} (shape {packed.shape})"
        )
    return join_planes(unpack_planes(packed), in_features)


def split_planes(values: jax.Array) -> jax.Array:
    """`(..., K)` as digit planes `(..., 5, P)`: plane `i` holds columns `i*P` to `(i+1)*P - 1`, zero past the last."""
    columns = values.shape[-1]
    width = packed_width(columns)
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, TRITS_PER_BYTE * width - columns)])
    return padded.reshape(*values.shape[:-1], TRITS_PER_BYTE, width)


def join_planes(planes: jax.Array, in_features: int) -> jax.Array:
    """`(..., K)` from digit planes `(..., 5, P)`; the inverse of `split_planes`."""
    return planes.reshape(*planes.shape[:-2], -1)[..., :in_features]


def pack_planes(planes: jax.Array) -> jax.Array:
    """Bytes `uint8 (..., P)` of planes of trits `(..., 5, P)`."""
    places = np.array(_PLACE_VALUES, np.uint16)[:, None]
    value = jnp.sum((planes + 1).astype(jnp.uint16) * places, axis=-2, dtype=jnp.uint16)
    # ceil(value * 256 / 243) without leaving 16 bits: 256/243 = 1 + 13/243.
    return (value + (value * jnp.uint16(13) + jnp.uint16(242)) // jnp.uint16(243)).astype(jnp.uint8)


def unpack_planes(packed: jax.Array) -> jax.Array:
    """Planes of trits `int8 (..., 5, P)` of bytes `uint8 (..., P)`.

    A broadcast over a new axis, not five arrays joined: XLA compiles it forty times as fast and runs it no slower.
    """
    powers = np.array([3**i for i in range(TRITS_PER_BYTE)], np.uint8)[:, None]
    fraction = packed[..., None, :] * powers  # wraps modulo 256, which is the mask
    digit = (fraction.astype(jnp.uint16) * jnp.uint16(3)) >> 8
    return digit.astype(jnp.int8) - np.int8(1)


def digits(packed: jax.Array) -> list[jax.Array]:
    """The five digits (trits plus 1) of every byte, each uint8 of the shape of `packed`; 1 past the last column.

    For what is counted byte by byte, where the order of columns does not matter.
    """
    return [
        (((packed * np.uint8(3**i)).astype(jnp.uint16) * jnp.uint16(3)) >> 8).astype(jnp.uint8)
        for i in range(TRITS_PER_BYTE)
    ]


def valid_codes(packed: np.ndarray) -> np.ndarray:
    """Boolean array: which bytes are among the 243 codes that `pack_rows` writes."""
    value = np.arange(243)
    table = np.zeros(256, bool)
    table[(value * 256 + 242) // 243] = True
    return table[packed]


def padding_is_zero(packed: np.ndarray, in_features: int) -> bool:
    """Whether every trit at or past column `in_features` of `uint8 (..., N, P)` is 0, as `pack_rows` leaves it."""
    width = packed.shape[-1]
    for i in range(TRITS_PER_BYTE):
        tail = packed[..., max(in_features - i * width, 0) :].astype(np.uint16)
        if ((tail * 3**i % 256 * 3 >> 8) != 1).any():
            return False
    return True


def pack_flat(trits: np.ndarray) -> np.ndarray:
    """Interchange form of an `int8 (N, K)` trit matrix: `uint8 (ceil(N*K/5),)`, on the host.

    Raises:
        ValueError: the matrix is empty, or holds a value outside {-1, 0, 1}.
    """
    trits = np.asarray(trits)
    if trits.size == 0:
        raise ValueError(f"cannot pack an empty matrix, got shape {trits.shape}")
    if not np.isin(trits, (-1, 0, 1)).all():
        raise ValueError(f"trits must be -1, 0 or 1, got values from {trits.min()} to {trits.max()}")
    digits = np.zeros(TRITS_PER_BYTE * _bytes_of(trits.size), np.uint8)
    digits[: trits.size] = trits.reshape(-1).astype(np.int8) + 1
    place_values = np.array(_PLACE_VALUES[::-1], np.uint8)
    return (digits.reshape(-1, TRITS_PER_BYTE) * place_values).sum(axis=1).astype(np.uint8)


def unpack_flat(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """Trit matrix `int8 (N, K)` of an interchange form, on the host.

    Raises:
        ValueError: the number of bytes does not fit the shape, or a byte is above 242.
    """
    packed = np.asarray(packed, np.uint8).reshape(-1)
    size = out_features * in_features
    if size <= 0 or packed.size != _bytes_of(size):
        raise ValueError(
            f"a {out_features} x {in_features} matrix has {_bytes_of(max(size, 0))} bytes, got {packed.size}"
        )
    if packed.max() > 242:
        raise ValueError(f"a byte of five trits is at most 242, got {packed.max()}")
    digits = packed[:, None] // np.array(_PLACE_VALUES[::-1], np.uint8) % np.uint8(3)
    return (digits.reshape(-1)[:size].astype(np.int8) - 1).reshape(out_features, in_features)
