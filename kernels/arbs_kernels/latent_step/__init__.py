"""One rounded step of integer latents."""

from arbs_kernels.latent_step.api import latent_step

__all__ = ["latent_step"]
