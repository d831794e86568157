"""Composite motifs: pairs of neighbouring motifs, looked up in a codebook of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.arb.vq import SharedVQ, VQConfig, VQOutput


class CompositeCodebook(nn.Module):
    """Motif vectors `(B, S, D)` to the composites of each motif with the one before it, as `SharedVQ` gives them.

    A small network proposes: both vectors, normalised and side by side, through one hidden layer of SiLU to
    what `SharedVQ` projects to its `dim`. Position i uses i - 1 and i alone.
    """

    config: VQConfig
    ternary: TernaryConfig
    hidden: int = 256
    """Channels of the network that proposes."""

    @nn.compact
    def __call__(
        self, motifs_BxSxD: jax.Array, previous_BxD: jax.Array | None = None, ids_BxS: jax.Array | None = None
    ) -> VQOutput:
        """See the class; `previous_BxD` is the motif before the first, None for zeros; `ids` as for `SharedVQ`."""
        normed_BxSxD = TernaryRMSNorm()(motifs_BxSxD)
        first_BxD = jnp.zeros_like(motifs_BxSxD[:, 0]) if previous_BxD is None else TernaryRMSNorm()(previous_BxD)
        before_BxSxD = jnp.concatenate([first_BxD[:, None], normed_BxSxD[:, :-1]], axis=1)
        pair_BxSx2D = jnp.concatenate([before_BxSxD, normed_BxSxD], axis=-1)
        proposed = nn.silu(TernaryDense(features=self.hidden, config=self.ternary, name="propose")(pair_BxSx2D))
        return SharedVQ(self.config, self.ternary, name="book")(proposed, ids_BxS)
