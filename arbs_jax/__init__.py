"""Neural networks whose persistent state is integers only: packed trits, exponents, accumulators and counters."""

from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryEmbed, TernaryExperts, TernaryRMSNorm, TernaryTable
from arbs_jax.rules import BigInt, Integral, Latent
from arbs_jax.votes import add_votes, make_probes, matrix_specs, update, value_and_votes

__all__ = [
    "BigInt",
    "Integral",
    "Latent",
    "TernaryConfig",
    "TernaryDense",
    "TernaryEmbed",
    "TernaryExperts",
    "TernaryRMSNorm",
    "TernaryTable",
    "add_votes",
    "make_probes",
    "matrix_specs",
    "update",
    "value_and_votes",
]
