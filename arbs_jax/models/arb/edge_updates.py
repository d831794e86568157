"""What the meetings of one step do to a graph's edges (see `edges`): integers in, integers out.

Meetings are summed by pair before anything moves, so the order of sequences, micro-batches and devices is of no
consequence. Axes: S positions, W offsets 1 to `window`, M pairs of positions that could meet, U buckets that they can
touch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.edges import EdgeConfig, Edges, bucket_of
from arbs_kernels.row_update import put_rows, rows_of


def observe_edges(config: EdgeConfig, edges: Edges, ids: jax.Array, agreement: jax.Array, step: jax.Array) -> Edges:
    """The edges after the meetings of one step, from however many sequences.

    An edge gains the agreements of its pair, by its sign, and loses its *share*: one for every `toll` meetings in its
    bucket (of its destination, if dense). So edges stay whose agreements outweigh an even share of the traffic, as in
    counting frequent items with few counters (Misra and Gries, 1982). Those that became too weak leave. Pairs that met
    but had no edge are admitted if their agreements outweigh the share: those of a bucket in order of how often they
    met (ties by destination, then source), each into the next weakest slot (ties by number), as long as that slot's
    score is at most `admit`. A new edge has the sign of its meetings' sum.

    Args:
        config: of the edges.
        edges: integer state.
        ids: motifs in order, int32 (..., S).
        agreement: int8 (..., S, W) in {-1, 0, 1}: of position `i` with position `i - 1 - w`.
        step: int32 (), updates taken before this one; staggers the rounding of shares.

    Returns:
        Edges of the same shapes and dtypes; scores saturate at 127 (dense ones at -127, too).

    Raises:
        ConfigError: `agreement` has another shape than `ids` and `window` ask for.
    """
    if agreement.shape != (*ids.shape, config.window):
        raise ConfigError(
            f"agreement must have the shape of ids and edges.window, {(*ids.shape, config.window)}, "
            f"got {agreement.shape}"
        )
    source, destination, agreed = _meetings(config, ids, agreement)
    if config.dense:
        return _observe_dense(config, edges, source, destination, agreed, jnp.asarray(step, jnp.int32))
    bucket = jnp.where(destination >= 0, bucket_of(config, destination), config.buckets)
    totals = _Totals.of(bucket, destination, source, agreed)
    return _observe_slots(config, edges, totals, jnp.asarray(step, jnp.int32))


def _meetings(config: EdgeConfig, ids: jax.Array, agreement: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(source, destination, agreement), all int32 (M,), of every pair of positions that could meet; source and
    destination are -1 where the pair is none."""
    length = ids.shape[-1]
    flat = ids.reshape(-1, length).astype(jnp.int32)
    flat = jnp.where((flat >= 0) & (flat < config.motifs), flat, -1)
    padded = jnp.pad(flat, ((0, 0), (config.window, 0)), constant_values=-1)
    offsets = range(1, config.window + 1)
    source = jnp.stack([padded[:, config.window - offset :][:, :length] for offset in offsets], axis=-1)
    destination = jnp.broadcast_to(flat[..., None], source.shape)
    both = (source >= 0) & (destination >= 0)
    return (
        jnp.where(both, source, -1).reshape(-1),
        jnp.where(both, destination, -1).reshape(-1),
        jnp.where(both, agreement.reshape(source.shape).astype(jnp.int32), 0).reshape(-1),
    )


def _observe_dense(
    config: EdgeConfig, edges: Edges, source: jax.Array, destination: jax.Array, agreed: jax.Array, step: jax.Array
) -> Edges:
    before = edges["score"].astype(jnp.int32)
    evidence = jnp.zeros_like(before)
    evidence = evidence.at[destination, source].add(agreed, mode="drop", wrap_negative_indices=False)
    met = jnp.zeros((config.motifs,), jnp.int32)
    met = met.at[destination].add(1, mode="drop", wrap_negative_indices=False)
    share = _share(config, met, jnp.arange(config.motifs, dtype=jnp.int32), step)[:, None]
    total = before + evidence
    after = jnp.sign(total) * jnp.maximum(jnp.abs(total) - share, 0)
    after = before + jnp.clip(after - before, -config.gain, config.gain)
    return {"score": jnp.clip(after, -127, 127).astype(jnp.int8)}


def _share(config: EdgeConfig, met: jax.Array, number: jax.Array, step: jax.Array) -> jax.Array:
    """`met / toll`, rounded down or up in turn, so that the mean over steps is right; int32 like `met`.

    `met` counts the meetings of each bucket or motif, whose `number` staggers the turns. 0 where nobody met.
    """
    return jnp.where(met > 0, (met + (step + number) % config.toll) // config.toll, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Totals:
    """Meetings summed by pair, in order of (bucket, destination, source); all (M,).

    A pair's sums stand at its first meeting, its *head*; pairs that are none come last, in the bucket past the last.
    """

    bucket: jax.Array
    """int32, of the destination."""
    destination: jax.Array
    """int32, motif that receives."""
    source: jax.Array
    """int32, motif that sends."""
    head: jax.Array
    """bool, whether this is a pair's first meeting."""
    count: jax.Array
    """int32, meetings of the pair."""
    evidence: jax.Array
    """int32, sum of their agreements."""

    @classmethod
    def of(cls, bucket: jax.Array, destination: jax.Array, source: jax.Array, agreed: jax.Array) -> "_Totals":
        """Sums int32 (M,) meetings; sums of integers, so in whatever order they came."""
        bucket, destination, source, agreed = jax.lax.sort((bucket, destination, source, agreed), num_keys=3)
        head = _changes(bucket) | _changes(destination) | _changes(source)
        pair = jnp.cumsum(head, dtype=jnp.int32) - 1
        count = jnp.zeros_like(pair).at[pair].add(1, indices_are_sorted=True)
        evidence = jnp.zeros_like(pair).at[pair].add(agreed, indices_are_sorted=True)
        return cls(bucket, destination, source, head, count[pair], evidence[pair])


def _observe_slots(config: EdgeConfig, edges: Edges, totals: _Totals, step: jax.Array) -> Edges:
    """Buckets are taken out of the state, changed and put back in place: nothing of the state's size is made."""
    starts = _changes(totals.bucket)
    touched_M = jnp.cumsum(starts, dtype=jnp.int32) - 1
    # One more than there are buckets: pairs that are none have one of their own, which is put back nowhere.
    size = min(totals.bucket.shape[0], config.buckets + 1)
    bucket_U = jnp.full((size,), config.buckets, jnp.int32).at[touched_M].set(totals.bucket, mode="drop")
    rows = rows_of(edges, bucket_U)

    met = jnp.zeros((size,), jnp.int32).at[touched_M].add(1, indices_are_sorted=True)
    share_U = _share(config, met, bucket_U, step)

    same = (rows["destination"][touched_M] == totals.destination[:, None]) & (
        rows["source"][touched_M] == totals.source[:, None]
    )
    known = jnp.any(same, axis=1) & (totals.bucket < config.buckets)
    slot = jax.lax.argmax(same, 1, jnp.int32)
    agreed = rows["sign"][touched_M, slot].astype(jnp.int32) * totals.evidence
    moved = jnp.broadcast_to(-share_U[:, None], rows["score"].shape)
    moved = moved.at[jnp.where(totals.head & known, touched_M, size), slot].add(agreed, mode="drop")
    score = rows["score"].astype(jnp.int32)
    score = jnp.where(score > 0, jnp.minimum(score + jnp.clip(moved, -config.gain, config.gain), 127), 0)

    stays = score >= config.evict
    rows = {
        "source": jnp.where(stays, rows["source"], -1),
        "destination": jnp.where(stays, rows["destination"], -1),
        "sign": jnp.where(stays, rows["sign"], jnp.int8(0)),
        "score": jnp.where(stays, score, 0).astype(jnp.int8),
    }
    new = totals.head & ~known & (totals.bucket < config.buckets)
    strength = jnp.minimum(jnp.abs(totals.evidence) - share_U[touched_M], config.gain)
    rows = _admit(config, rows, totals, jnp.where(new & (strength >= config.evict), touched_M, size), strength)
    return put_rows(edges, bucket_U, rows)


def _admit(config: EdgeConfig, rows: Edges, totals: _Totals, place: jax.Array, strength: jax.Array) -> Edges:
    """`rows (U, degree)` with new pairs in their weakest slots.

    `place` int32 (M,) is the row of a pair that asks to be admitted, and U for all others; `strength` int32 (M,) its
    score if it is.
    """
    size = rows["score"].shape[0]
    # Pairs come in order of (bucket, destination, source), which a stable sort keeps among equals.
    place, _, destination, source, evidence, strength = jax.lax.sort(
        (place, -totals.count, totals.destination, totals.source, totals.evidence, strength), num_keys=2
    )
    position = jnp.arange(place.shape[0], dtype=jnp.int32)
    rank = position - jax.lax.cummax(jnp.where(_changes(place), position, 0))

    slots = jnp.broadcast_to(jnp.arange(config.degree, dtype=jnp.int32), rows["score"].shape)
    weakest = jax.lax.sort((rows["score"], slots), dimension=1, num_keys=1)[1]
    slot = weakest.at[place, rank].get(mode="fill", fill_value=config.degree)
    weak = rows["score"].at[place, slot].get(mode="fill", fill_value=127) <= config.admit
    at = (jnp.where(weak, place, size), slot)
    return {
        "source": rows["source"].at[at].set(source, mode="drop"),
        "destination": rows["destination"].at[at].set(destination, mode="drop"),
        "sign": rows["sign"].at[at].set(jnp.sign(evidence).astype(jnp.int8), mode="drop"),
        "score": rows["score"].at[at].set(strength.astype(jnp.int8), mode="drop"),
    }


def _changes(values: jax.Array) -> jax.Array:
    """bool (M,): whether a value differs from the one before it; the first does."""
    return jnp.concatenate([jnp.ones((1,), jnp.bool_), values[1:] != values[:-1]])
