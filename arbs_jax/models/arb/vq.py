"""Shared VQ: every vector becomes the nearest row of one large ternary codebook.

A vector is projected to a few channels and brought to root mean square 1; the nearest row, at the same length, takes
its place and is projected back. The output is straight-through (van den Oord et al., "Neural Discrete Representation
Learning", 2017): its gradient goes to the projected input as if no row had taken its place, and the row learns from
the codebook loss alone. How the nearest row is found, and why by angle, is in `arbs_jax.models.arb.search`.

Arrays are suffixed by their axes: B batch, S positions, D width, K channels of the codebook, M lookups, W worst inputs.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError
from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryTable
from arbs_jax.models.arb.search import Runs, nearest_candidate, nearest_row, plant, unit_rows
from arbs_jax.models.checks import require_dtype, require_positive

INPUT_STEPS = 31
"""int8 steps per unit of a quantised input, whose root mean square is 1: 4 * 31 = 124 fits."""


@dataclass(frozen=True)
class VQConfig:
    """Shape of a codebook and how it is searched."""

    rows: int
    """Rows of the codebook, below 2^24."""
    width: int
    """`D`, channels of the output."""
    dim: int = 64
    """`K`, channels of the codebook."""
    exact_rows: int = 2**17
    """A book of up to this many rows is searched whole, a larger one among candidates."""
    blocks: int = 256
    """Runs of neighbouring rows that each input looks into."""
    block_rows: int = 4
    """Fewest rows of a run; candidates are `blocks * block_rows` to twice that many. Many short runs find more than few
    long ones (experiments/2026_11_21_vq_recall)."""
    commitment: float = 0.25
    """Weight of the loss that draws inputs to their rows."""
    revive_after: int = 1000
    """Steps after which a use counts half; a row whose uses have come down to 0 is dead."""
    budget: int = 2**24
    """Numbers that a search may decode or score at a time."""
    shielded: bool = False
    """Whether the commitment moves the projection alone, and not what comes before it; the projection then votes
    twice, once for each."""
    dtype: str = "float32"
    """Activations: "float32" or "bfloat16"."""

    def __post_init__(self) -> None:
        require_positive("vq", self, "width", "dim", "blocks", "block_rows", "revive_after", "budget")
        if not 1 <= self.rows < 2**24:
            raise ConfigError(f"vq.rows must be in [1, 2^24), got {self.rows}")
        if self.commitment < 0:
            raise ConfigError(f"vq.commitment must not be negative, got {self.commitment}")
        if self.runs.bits > self.dim:
            raise ConfigError(
                f"vq.dim must be at least {self.runs.bits}, the signs that name a run of {self.block_rows} of "
                f"{self.rows} rows, got {self.dim}; raise it or vq.block_rows"
            )
        require_dtype("vq", self)

    @property
    def runs(self) -> Runs:
        """How rows lie in runs."""
        return Runs(self.rows, min(self.block_rows, self.rows))

    @property
    def exact(self) -> bool:
        """Whether the whole book is searched."""
        return self.rows <= self.exact_rows


class VQOutput(NamedTuple):
    """What a lookup gives; losses are float32 and weighed by the caller (the commitment's weight is in it)."""

    output_BxSxD: jax.Array
    """The rows, projected back."""
    ids_BxS: jax.Array
    """int32, which rows."""
    latent_BxSxK: jax.Array
    """float32, the projected inputs at root mean square 1; no gradient goes through it."""
    commitment_BxS: jax.Array
    """Mean square from input to row, which moves the input."""
    codebook_BxS: jax.Array
    """The same, unweighed, which moves the row."""
    spread: jax.Array
    """(), how far the inputs are from filling their space, see `spread_loss`; it moves what the commitment moves."""


def spread_loss(z_BxSxK: jax.Array) -> jax.Array:
    """Mean over channels of the squared distance of the inputs' second moments to those of white ones, float32 ().

    Inputs of root mean square 1, float32; 0 where their channels are centred, uncorrelated and alike, `K - 1` where all
    inputs are one. (The covariance term of Bardes et al., "VICReg", 2022, with the variances in it.) What is drawn to
    rows while rows are drawn to it otherwise ends at one row for everything.
    """
    flat_MxK = z_BxSxK.reshape(-1, z_BxSxK.shape[-1])
    moments_KxK = jnp.matmul(flat_MxK.T, flat_MxK, precision=jax.lax.Precision.HIGHEST) / flat_MxK.shape[0]
    return jnp.sum(jnp.square(moments_KxK - jnp.eye(flat_MxK.shape[1], dtype=jnp.float32))) / flat_MxK.shape[1]


class SharedVQ(nn.Module):
    """Vectors `(B, S, any)` to `VQOutput`; see the module. State: `down`, `codebook`, `up`."""

    config: VQConfig
    ternary: TernaryConfig

    def setup(self) -> None:
        config = self.config
        self.down = TernaryDense(features=config.dim, config=self.ternary)
        self.codebook = TernaryTable(
            num_embeddings=config.rows,
            features=config.dim,
            dtype=jnp.dtype(config.dtype),
            config=self.ternary,
            plant=partial(plant, runs=config.runs, columns=config.dim),
        )
        self.up = TernaryDense(features=config.width, config=self.ternary)

    def __call__(self, x_BxSxD: jax.Array, ids_BxS: jax.Array | None = None) -> VQOutput:
        """See the class; with `ids`, int32, of the nearest rows, they are not searched for."""
        z_BxSxK = unit_rows(self.down(x_BxSxD.astype(self.config.dtype)))
        latent_BxSxK = jax.lax.stop_gradient(z_BxSxK)
        ids_BxS = self.nearest(latent_BxSxK) if ids_BxS is None else ids_BxS
        row_BxSxK = unit_rows(self.codebook(ids_BxS))
        drawn_BxSxK = z_BxSxK
        if self.config.shielded:
            drawn_BxSxK = unit_rows(self.down(jax.lax.stop_gradient(x_BxSxD).astype(self.config.dtype)))
        commitment_BxS = jnp.mean(jnp.square(drawn_BxSxK - jax.lax.stop_gradient(row_BxSxK)), axis=-1)
        codebook_BxS = jnp.mean(jnp.square(latent_BxSxK - row_BxSxK), axis=-1)
        through_BxSxK = z_BxSxK + jax.lax.stop_gradient(row_BxSxK - z_BxSxK)
        return VQOutput(
            output_BxSxD=self.up(through_BxSxK.astype(self.config.dtype)),
            ids_BxS=ids_BxS,
            latent_BxSxK=latent_BxSxK,
            commitment_BxS=self.config.commitment * commitment_BxS,
            codebook_BxS=codebook_BxS,
            spread=spread_loss(drawn_BxSxK),
        )

    def nearest(self, latent: jax.Array, exact: bool | None = None) -> jax.Array:
        """Ids int32 of the nearest rows of inputs `(..., K)`; `exact` None searches as the configuration says."""
        config = self.config
        if self.is_initializing():  # There is no book yet to look into.
            return jnp.zeros(latent.shape[:-1], jnp.int32)
        self.codebook.peek(jnp.zeros((1,), jnp.int32))  # Linen wants a module's state bound outside of loops.
        flat_MxK = jax.lax.stop_gradient(latent).reshape(-1, config.dim)
        if config.exact if exact is None else exact:
            ids_M = nearest_row(flat_MxK, config.rows, self.codebook.peek, config.budget)
        else:
            ids_M = nearest_candidate(flat_MxK, config.runs, config.blocks, self.codebook.peek, config.budget)
        return ids_M.reshape(latent.shape[:-1])

    def vectors(self, ids: jax.Array) -> jax.Array:
        """What rows are projected back to, `(*ids.shape, D)`; the rows take no vote.

        Raises:
            ConfigError: ids that can be read here are out of range; under `jit` they are clamped.
        """
        check_ids(ids, self.config)
        return self.up(unit_rows(self.codebook.peek(ids)).astype(self.config.dtype))


def check_ids(ids: jax.Array | np.ndarray, config: VQConfig) -> None:
    """Refuses ids outside the codebook, where they are known: values that are being traced pass.

    Raises:
        ConfigError: the smallest and the largest of them and the range.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(f"codebook ids must be integers, got {ids.dtype}")
    if isinstance(ids, jax.core.Tracer) or ids.size == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.rows:
        raise ConfigError(
            f"codebook ids must be in [0, {config.rows}), got ids from {low} to {high}; "
            "were they made with another codebook?"
        )


def vq_events(output: VQOutput, worst: int = 64) -> dict[str, jax.Array]:
    """What bookkeeping learns of a lookup, integers: `ids` int32 (M,), all of them; `inputs` int8 (W, K), the inputs
    furthest from their rows in 1/31, worst first; `W = min(worst, M)`.
    """
    ids_M = output.ids_BxS.reshape(-1)
    latent_MxK = output.latent_BxSxK.reshape(ids_M.shape[0], -1)
    furthest_W = jax.lax.top_k(jax.lax.stop_gradient(output.codebook_BxS).reshape(-1), min(worst, ids_M.shape[0]))[1]
    scaled_WxK = jnp.round(latent_MxK[furthest_W] * INPUT_STEPS)
    return {"ids": ids_M, "inputs": jnp.clip(scaled_WxK, -127, 127).astype(jnp.int8)}
