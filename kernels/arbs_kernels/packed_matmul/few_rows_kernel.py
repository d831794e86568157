"""The Triton kernel that multiplies few rows of bfloat16 activations by the bytes themselves.

It computes `y^T = W x^T` with weights as the first operand of the tensor core's 16 x 8 x 16 product, which each
warp issues by itself (`mma.sync`) on weights that it decoded in its own registers. No shared memory, no
barrier and no wait until the end, so many warps hide each other's loads; and each asks for the next tile's codes and
scales before it computes the one at hand. Every tensor has one element for each thread of the program: that is the one
layout in which an instruction of a whole warp finds its operands. Loads are written in PTX: several registers at once,
hints for the caches, and no time in Triton's compiler.

Two codes become ten trits on the halves of registers (`five_planes`), and a product by the scale makes each pair
two weights. `whole_windows_kernel` spares that where it can, for groups of whole windows and fewer rows.

The order of the products' inner axis is free, as long as both operands agree. In fragment `m16n8k16` a thread holds
rows `lane / 4` and 8 more of W, columns `lane / 4` of `x^T`, and four positions of the inner axis: it takes a run of 16
or 32 bytes of a row in one go, four for each fragment, five planes each. So a thread needs one scale for a run, or two
and a choice where a group may end within it. Groups shorter than a run take a scale, or two, for every four. Scales
lie with the rows of one group side by side, so that a warp's eight rows find theirs in one piece of the cache.

Rows of P bytes begin at any address; those `CLASSES` apart begin at the same remainder modulo 4, their phase. A program
takes rows of one class, reads from the aligned word before their beginning, and puts five zeros for every code that
is not of the row.
"""

# ruff: noqa: RUF005  Triton's compiler knows no unpacking.

import triton
import triton.language as tl

from arbs_kernels.packed_matmul.few_rows_ptx import (
    FAR,
    NO_TRITS,
    choice_of,
    chosen,
    fence,
    five_planes,
    loaded,
    one_scale,
    only_own,
    product,
    scaled,
    shifted,
    two_scales,
)


@triton.jit
def codes_at(row_at, byte, place, end, WORDS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """`4 WORDS` codes of each row from `byte` on, as uint32; those from `end` on are not of the row."""
    words = ()
    for row in tl.static_range(len(row_at)):
        at = row_at[row] + byte.to(tl.int64)
        for first in tl.static_range(0, WORDS, WIDTH):
            limit = end if WHOLE else end - 4 * first
            words = words + loaded(at + 4 * first, place, limit, NO_TRITS, WIDTH, True)
    return words


@triton.jit
def scales_at(
    row_at,
    place,
    FIRST: tl.constexpr,
    wanted,
    N: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A pair for each row where `wanted < FAR`: the scale of column `place + FIRST` twice if EXACT, else that scale and
    that of the group after. `row_at` are addresses in the first group; WHOLE says that the row has such columns."""
    if WHOLE & EXACT & (FIRST % G == 0):
        group = place // G + FIRST // G
    else:
        group = tl.minimum(tl.maximum(place + FIRST, 0) // G, R - 1)
    offset = group.to(tl.int64) * (2 * N)
    scales = ()
    if EXACT:
        for row in tl.static_range(len(row_at)):
            scales = scales + (one_scale(row_at[row] + offset, wanted, FAR),)
    else:
        after = tl.minimum(group + 1, R - 1).to(tl.int64) * (2 * N)
        for row in tl.static_range(len(row_at)):
            scales = scales + (two_scales(row_at[row] + offset, row_at[row] + after, wanted, FAR),)
    return scales


@triton.jit
def x_at(row_at, place, FIRST: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr, P: tl.constexpr, COUNT: tl.constexpr):
    """Pairs of elements of a row of x in COUNT uint32 from column `place + FIRST` on, zeros outside of it.

    The address of `place` is `row_at`; it is at most LAST.
    """
    INSIDE: tl.constexpr = LAST + FIRST + 2 * COUNT + 2 * (P % 2) <= K
    words = ()
    if P % 4 == 0:
        ALIGNED: tl.constexpr = 1 if K % 4 != 0 else 2 if (P % 8 != 0) | (K % 8 != 0) else 4
        WIDTH: tl.constexpr = ALIGNED if ALIGNED < COUNT else COUNT
        for first in tl.static_range(0, COUNT, WIDTH):
            at = row_at + 2 * (FIRST + 2 * first)
            words = words + loaded(at, 0 if INSIDE else place, 1 if INSIDE else K - FIRST - 2 * first, 0, WIDTH, False)
    else:
        # An odd column begins in the upper half of a word. Columns before the row are as those after it.
        odd = place + FIRST & 1
        raw = ()
        for index in tl.static_range(COUNT if P % 2 == 0 else COUNT + 1):
            at = row_at + (FIRST + 2 * index) * 2 - 2 * odd
            column = place + FIRST + 2 * index - odd
            if FIRST < 4:
                raw = raw + loaded(at, tl.where(column < 0, FAR, column), K, 0, 1, False)
            elif INSIDE:
                raw = raw + loaded(at, 0, 1, 0, 1, False)
            else:
                raw = raw + loaded(at, column, K, 0, 1, False)
        if P % 2 == 0:
            words = raw
        else:
            for index in tl.static_range(COUNT):
                words = words + (shifted(raw[index], raw[index + 1], 16 * odd),)
    return words


@triton.jit
def added(total, weights, x, FIRST: tl.constexpr, CHUNK: tl.constexpr, CHAINS: tl.constexpr, ROW_TILES: tl.constexpr):
    """Sums with the products of all rows, all of x, and CHUNK words from FIRST on.

    Words take chains by turns. All sums are renewed at once: a tuple with one sum replaced is a copy of the others.
    """
    sums = ()
    for at in tl.static_range(len(total) // 4):
        four = total[4 * at : 4 * at + 4]
        for word in tl.static_range(CHUNK):
            if (FIRST + word) % CHAINS == at % CHAINS:
                four = product(
                    weights[4 * ROW_TILES * word + 2 * (at // CHAINS % ROW_TILES)],
                    weights[4 * ROW_TILES * word + 2 * (at // CHAINS % ROW_TILES) + 1],
                    weights[4 * ROW_TILES * word + 2 * (at // CHAINS % ROW_TILES + ROW_TILES)],
                    weights[4 * ROW_TILES * word + 2 * (at // CHAINS % ROW_TILES + ROW_TILES) + 1],
                    x[2 * (CHUNK * (at // CHAINS // ROW_TILES) + word)],
                    x[2 * (CHUNK * (at // CHAINS // ROW_TILES) + word) + 1],
                    four[0],
                    four[1],
                    four[2],
                    four[3],
                )
        sums = sums + (four[0], four[1], four[2], four[3])
    return sums


@triton.jit
def asked(
    codes_of,
    scales_of,
    byte,
    alive,
    phase,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A thread's codes of a tile, and its scales where its run needs no more than two."""
    WIDTH: tl.constexpr = 4 if P % 16 == 0 else 2 if P % 8 == 0 else 1
    place = tl.where(alive, byte, FAR)
    given = codes_at(codes_of, byte, place, phase + P, WORDS, WIDTH, WHOLE)
    if UNIT > 4:
        for plane in tl.static_range(5):
            given = given + scales_at(scales_of, byte - phase, plane * P, place, N, R, G, EXACT, WHOLE & (K == 5 * P))
    return given


@triton.jit
def few_rows(
    x_ptr,
    trits_ptr,
    scale_ptr,
    y_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
    DIRECT_X: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    DEPTH_WARPS: tl.constexpr,
):
    """Part of `y` (splits, M, N) of one block of rows and some tiles of bytes.

    x: bfloat16 (M, K) if DIRECT_X, else what `fragments` makes; scale: bfloat16 (R, N). A warp takes STEPS tiles;
    WHOLE says that all are full.
    """
    BLOCKS_OF_8: tl.constexpr = (M + 7) // 8
    ROWS: tl.constexpr = 2 * ROW_TILES
    RUN: tl.constexpr = 4 * WORDS
    UNIT: tl.constexpr = RUN if G >= RUN else 4
    EXACT: tl.constexpr = (P % UNIT == 0) & (G % UNIT == 0)
    EXACT_WORDS: tl.constexpr = (P % 4 == 0) & (G % 4 == 0)
    CODES: tl.constexpr = ROWS * WORDS
    ASKED: tl.constexpr = CODES + (5 * ROWS if UNIT > 4 else 0)
    FURTHER: tl.constexpr = 8 * CLASSES if N % (16 * ROW_TILES * ROW_WARPS * CLASSES) == 0 else 0
    LAST: tl.constexpr = 16 * WORDS * TILES - RUN
    CHAINS: tl.constexpr = 2 if ROW_TILES * BLOCKS_OF_8 == 1 else 1
    thread = tl.arange(0, 32 * ROW_WARPS * DEPTH_WARPS)
    lane = thread % 32
    depth = thread // 32 % DEPTH_WARPS
    member = 0 if CLASSES == 1 else tl.program_id(0) // BLOCKS
    phase = 0 if CLASSES == 1 else member * P % 4
    block = tl.program_id(0) % BLOCKS * (16 * ROW_TILES * ROW_WARPS)
    local = block + thread // (32 * DEPTH_WARPS) * (16 * ROW_TILES) + lane // 4
    codes_of = ()
    scales_of = ()
    for each in tl.static_range(ROWS):
        inner = local
        if FURTHER == 0:
            inner = tl.minimum(local + 8 * each, (N - 1 - member) // CLASSES)
        row_of = trits_ptr.to(tl.int64) + (member * P // 4 * 4 + inner * (CLASSES * P))
        codes_of = codes_of + (row_of + each * FURTHER * P,)
        row_of = scale_ptr.to(tl.int64) + 2 * (member + CLASSES * inner).to(tl.int64)
        scales_of = scales_of + (row_of + each * FURTHER * 2,)
    x_of = ()
    for eight in tl.static_range(BLOCKS_OF_8):
        if DIRECT_X:
            x_of = x_of + (x_ptr.to(tl.int64) + tl.minimum(8 * eight + lane // 4, M - 1) * (2 * K),)
        else:
            x_of = x_of + (x_ptr.to(tl.int64) + (eight * (64 * RUN) + lane * (8 * CHUNK)),)
    total = ()
    for _ in tl.static_range(4 * ROW_TILES * BLOCKS_OF_8 * CHAINS):
        total = total + (tl.zeros_like(lane).to(tl.float32),)

    first = (tl.program_id(1) * (STEPS * DEPTH_WARPS) + depth) * (16 * WORDS) + lane % 4 * RUN
    STRIDE: tl.constexpr = DEPTH_WARPS * 16 * WORDS
    queue = ()
    for step in tl.static_range(AHEAD):
        byte = first + step * STRIDE
        queue = queue + asked(codes_of, scales_of, byte, True, phase, N, K, P, R, G, WHOLE, WORDS, UNIT, EXACT)
    for step in range(STEPS):
        byte = first + (step + AHEAD) * STRIDE
        alive = step + AHEAD < STEPS
        queue = queue + asked(codes_of, scales_of, byte, alive, phase, N, K, P, R, G, WHOLE, WORDS, UNIT, EXACT)
        fence(lane)
        byte = first + step * STRIDE
        tile = byte // (16 * WORDS)
        words = queue[:CODES]
        if DIRECT_X & (P % 4 != 0):
            words = only_own(words, byte, phase, phase + P, ROWS)
        scales = queue[CODES:ASKED]
        for chunk in tl.static_range(0, WORDS, CHUNK):
            if P % 4 != 0:
                fence(lane)
            pairs = ()
            for word in tl.static_range(chunk, chunk + CHUNK):
                for row in tl.static_range(ROWS):
                    pairs = pairs + (five_planes(words[WORDS * row + word], False),)
            for plane in tl.static_range(5):
                x = ()
                for eight in tl.static_range(BLOCKS_OF_8):
                    if DIRECT_X:
                        row_at = x_of[eight] + 2 * (byte - phase).to(tl.int64)
                        x = x + x_at(row_at, byte - phase, plane * P + 4 * chunk, LAST, K, P, 2 * CHUNK)
                    else:
                        run = (member * (5 * TILES) + tile).to(tl.int64) * (BLOCKS_OF_8 * 64 * RUN) + plane * (
                            TILES * BLOCKS_OF_8 * 64 * RUN
                        )
                        x = x + loaded(x_of[eight] + run + chunk * 256, 0, 1, 0, 2 * CHUNK, False)
                weights = ()
                for word in tl.static_range(chunk, chunk + CHUNK):
                    if UNIT == RUN:
                        column = plane * P + byte - phase
                        place = 4 * word
                        own = scales[plane * ROWS : (plane + 1) * ROWS]
                    else:
                        column = plane * P + byte - phase + 4 * word
                        place = 0
                        own = scales_at(scales_of, byte - phase, plane * P + 4 * word, 0, N, R, G, EXACT, False)
                    left = (tl.maximum(column, 0) // G + 1) * G - column - place
                    if EXACT_WORDS and not EXACT:
                        own = chosen(own, tl.where(left > 0, 0x1010, 0x3232))
                    for half in tl.static_range(2):
                        some = own
                        if not (EXACT or EXACT_WORDS):
                            some = chosen(own, choice_of(left - 2 * half))
                        for row in tl.static_range(ROWS):
                            trits = pairs[ROWS * (word - chunk) + row][2 * plane + half]
                            weights = weights + (scaled(trits, some[row]),)
                total = added(total, weights, x, chunk, CHUNK, CHAINS, ROW_TILES)
        queue = queue[ASKED:]

    out = y_ptr + tl.program_id(1) * (M * N)
    if DEPTH_WARPS > 1:
        lane = tl.arange(0, 32)[None, :]
        local = block + tl.arange(0, ROW_WARPS)[:, None] * (16 * ROW_TILES) + lane // 4
    for part in tl.static_range(4 * ROW_TILES * BLOCKS_OF_8):
        if part // (4 * ROW_TILES) * 8 + part % 2 < M:
            value = total[part // 4 * 4 * CHAINS + part % 4]
            if CHAINS == 2:
                value += total[part // 4 * 4 * CHAINS + part % 4 + 4]
            if DEPTH_WARPS > 1:
                value = tl.sum(tl.reshape(value, (ROW_WARPS, DEPTH_WARPS, 32)), axis=1)
            m = part // (4 * ROW_TILES) * 8 + lane % 4 * 2 + part % 2
            n = member + CLASSES * (local + part // 4 % ROW_TILES * 16 + part % 4 // 2 * 8)
            tl.store(out + m * N + n, (value * 0.5).to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))
