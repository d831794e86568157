"""Decoding: a text read in pieces gives the logits of the whole, and every part's past is needed for that."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY
from fresh import fresh
from support import is_float

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.decoding import Decoding, decode, empty_decoding
from arbs_jax.models.arb.memgram import observe_memgram
from arbs_jax.models.arb.model import ArbLM, empty_memory
from arbs_jax.sampling import Generator, SamplingConfig
from arbs_jax.votes import decode_tree

SIZES = {
    "width": 16,
    "embedding": 8,
    "sequencer_hidden": 24,
    "vq_rows": 12,
    "vq_dim": 8,
    "kg_rows": 60,
    "kg_hidden": 8,
    "layers": 2,
    "heads": 2,
    "head_dim": 8,
    "rope_dim": 4,
    "latent": 8,
    "hidden": 24,
    "ledger_stride": 4,
    "ledger_slots": 8,
    "lookback": 5,
    "experts": 3,
    "expert_hidden": 10,
    "max_moe_iters": 3,
    "head_hidden": 24,
    "context": 32,
}
CONFIG = ArbConfig(**SIZES, memgram=True, memgram_rows=50)
LENGTH = 17
TOKENS = np.random.default_rng(0).integers(0, 256, (2, LENGTH)).astype(np.int32)
# A hundred float32 operations on values of order one, through two blocks and three iterations.
TOLERANCE = 1000 * 2.0**-24


class Reader:
    """A model with fresh weights and bookkeeping that has counted something; `read` is compiled once for each T."""

    def __init__(self, config: ArbConfig):
        self.config, self.model = config, ArbLM(config, TERNARY)
        inputs = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        self.variables, self.specs = fresh(self.model, inputs, whole=True)
        self.memory = counted_memory(config)
        self.read = jax.jit(partial(decode, self.model))
        self.apply = jax.jit(self.model.apply)

    def whole(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self.apply(self.variables, tokens, self.memory))

    def in_pieces(self, tokens: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, Decoding]:
        state, parts = empty_decoding(self.config, tokens.shape[0], LENGTH), []
        for begin, end in pairwise([0, *cuts, tokens.shape[1]]):
            logits, state = self.read(self.variables, self.memory, state, tokens[:, begin:end])
            assert logits.shape[1] == end - begin - (0 if begin else 2)
            parts.append(np.asarray(logits))
        return np.concatenate(parts, axis=1), state


def counted_memory(config: ArbConfig):
    """Bookkeeping in which most edges are strong, and most n-grams."""
    memory, rng = empty_memory(config), np.random.default_rng(3)
    if "edges" in memory:
        memory["edges"] = {"score": jnp.asarray(rng.integers(-9, 10, (config.vq_rows,) * 2), jnp.int8)}
    if "memgram" in memory:
        assert config.memgram_part is not None
        ids = jnp.asarray(rng.integers(0, config.vq_rows, (2, 600)), jnp.int32)
        memory["memgram"] = jax.jit(observe_memgram, static_argnums=2)(memory["memgram"], ids, config.memgram_part)
    return memory


def same(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.fixture(scope="module")
def reader():
    """Without experts, which keep nothing, and take long to compile."""
    return Reader(replace(CONFIG, moe=False))


@pytest.fixture(scope="module")
def bytewise(reader):
    """(logits, state) of five bytes, then one at a time, over three ends of strides."""
    return reader.in_pieces(TOKENS, list(range(5, LENGTH)))


@pytest.mark.slow
def test_a_byte_at_a_time_is_the_whole(reader, bytewise):
    logits, state = bytewise
    same(logits, reader.whole(TOKENS))
    assert int(state.read) == LENGTH
    np.testing.assert_array_equal(state.past.ledger["positions"][:, :4], [[3, 7, 11, -1]] * 2)
    np.testing.assert_array_equal(state.past.tail_Bx2, TOKENS[:, -2:])


@pytest.mark.slow
def test_everything_that_is_kept_counts(reader):
    """With any leaf of the past as it was at first, other logits follow: none of them is idle."""
    # The position that is read next ends a stride.
    state = reader.in_pieces(TOKENS[:, :13], list(range(5, 13)))[1]
    expected = np.asarray(reader.read(reader.variables, reader.memory, state, TOKENS[:, 13:14])[0])
    fresh = empty_decoding(reader.config, 2, LENGTH)
    first = fresh.past._replace(tail_Bx2=jnp.zeros((2, 2), jnp.int32))
    leaves, structure = jax.tree.flatten(state.past)
    for at, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(first)):
        past = jax.tree.unflatten(structure, [*leaves[:at], leaf, *leaves[at + 1 :]])
        changed = replace(state, past=past)
        logits = reader.read(reader.variables, reader.memory, changed, TOKENS[:, 13:14])[0]
        assert (np.asarray(logits) != expected).any(), jax.tree_util.keystr(path)


OTHERS = {
    "bare": replace(CONFIG, vq=False, memgram=False, attention=False, graph=False, moe=False),
    "all": replace(CONFIG, query_latent=8),
    "no motifs": replace(CONFIG, vq=False, memgram=False, graph=False),
    "no context": replace(CONFIG, attention=False, kg_rows=0),
    "bfloat16": replace(CONFIG, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", ["bare", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_state_keeps_its_shapes(name):
    """So that it can be donated, and one program reads every byte; floats are activations alone."""
    config = OTHERS[name]
    model = ArbLM(config, TERNARY)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    memory = jax.eval_shape(lambda: empty_memory(config))
    reads = partial(jax.eval_shape, partial(decode, model), variables, memory)
    state = reads(jax.eval_shape(lambda: empty_decoding(config, 2, 12)), jax.ShapeDtypeStruct((2, 4), jnp.int32))[1]
    logits, after = reads(state, jax.ShapeDtypeStruct((2, 1), jnp.uint8))
    assert after == state
    assert (logits.shape, logits.dtype) == ((2, 1, 288), jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if is_float(leaf)} <= {config.dtype}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "second"), [("all", 10), ("no motifs", 5), ("no context", 5)])
def test_pieces_are_the_whole_with_other_parts(name, second):
    reader = Reader(OTHERS[name])
    same(reader.in_pieces(TOKENS, [4, *range(second, LENGTH)])[0], reader.whole(TOKENS))


@pytest.mark.slow
def test_weights_decoded_once_read_the_same():
    """Tables and experts stay packed, and are found beside what was decoded."""
    reader = Reader(replace(CONFIG, attention=False))
    packed = reader.in_pieces(TOKENS, [])[0]
    dense = jax.jit(lambda tree: decode_tree(tree, reader.specs, TERNARY.rule, jnp.dtype("float32")))
    decoded = dense(reader.variables["ternary"])
    assert decoded["vq"]["codebook"] == decoded["loop"]["loop"]["experts"]["up_proj"] == {}
    reader.variables["dense"] = decoded
    same(reader.in_pieces(TOKENS, [])[0], packed)
    # What was decoded is what is read.
    reader.variables["dense"] = jax.tree.map(jnp.zeros_like, decoded)
    assert not reader.in_pieces(TOKENS, [])[0].any()


@pytest.mark.slow
def test_sampling_agrees_with_recomputing(reader):
    """With prompts that are too short and too long, and room that runs out."""
    room = 8
    generator = Generator(
        reader.model, {**reader.variables, "memory": reader.memory}, SamplingConfig(temperature=0), room
    )
    for prompt in (b"q", b"a prompt that does not fit"):
        kept, expected = list(prompt.rjust(3, b"\n")), []
        for _ in range(14):
            if len(kept) > room:
                kept = kept[-(room // 2) :]
            padded = np.asarray([kept + [0] * (LENGTH - len(kept))] * 2, np.int32)
            expected.append(int(np.argmax(reader.whole(padded)[0, len(kept) - 3, :256])))
            kept.append(expected[-1])
        got = list(generator(prompt, 14))
        assert got == expected
        assert len(set(got)) > 3


def test_mistakes():
    model, state = ArbLM(CONFIG, TERNARY), empty_decoding(CONFIG, 1, 8)
    for length in (2, 33):
        with pytest.raises(ConfigError, match=f"room for 3 bytes to 32, the model's context; got {length}"):
            empty_decoding(CONFIG, 1, length)
    for count, message in [
        (2, "the first call must read at least 3 bytes, got 2"),
        (9, "0 bytes read and 9 more exceed the 8 that there is room for"),
    ]:
        with pytest.raises(ConfigError, match=message):
            decode(model, {}, None, state, jnp.zeros((1, count), jnp.int32))
    later = replace(state, read=jnp.int32(7), past=state.past._replace(tail_Bx2=jnp.zeros((1, 2), jnp.int32)))
    with pytest.raises(ConfigError, match="a call must read at least 1 bytes, got 0"):
        decode(model, {}, None, later, jnp.zeros((1, 0), jnp.int32))
    with pytest.raises(ConfigError, match="7 bytes read and 2 more exceed the 8"):
        decode(model, {}, None, later, jnp.zeros((1, 2), jnp.int32))
