"""Framework-free operators over packed ternary matrices, on JAX alone.

Importing this package lets explicitly requested int64 arrays keep their width while every default stays 32-bit:
correlation accumulators and vote counters need more than 32 bits, nothing else does.
"""

import jax

jax.config.update("jax_explicit_x64_dtypes", "allow")
