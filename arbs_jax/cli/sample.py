"""`arbs sample`: text from a run, streamed."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arbs_jax.cli.display import console, errors
from arbs_jax.cli.runs import open_run
from arbs_jax.cli.text import StreamDecoder, printable, sample_bytes
from arbs_jax.compilation import enable_cache
from arbs_jax.errors import ConfigError
from arbs_jax.sampling import SamplingConfig


@dataclass(frozen=True)
class Sample:
    """Write text with a trained run, one position per new byte through a key/value cache."""

    run: Annotated[Path | None, tyro.conf.arg(help="Run folder (default: the newest below runs/).", metavar="DIR")] = (
        None
    )
    checkpoint: str = "best"
    """latest, best, final or a step number."""
    prompt: str = "\n"
    """Text to go on from."""
    bytes: int = 512
    """How many bytes to write."""
    temperature: float = SamplingConfig.temperature
    """0 takes the likeliest byte every time."""
    top_k: int = SamplingConfig.top_k
    """Draw from the k likeliest bytes; 0 from all."""
    top_p: float = SamplingConfig.top_p
    """Draw from the likeliest bytes that make up this probability."""
    seed: int = SamplingConfig.seed
    """Same seed, same text."""
    packed: bool = False
    """Multiply from the packed state at every byte: least memory, slower than weights decoded once."""


def run(args: Sample) -> None:
    """Carries out `arbs sample`."""
    sampling = SamplingConfig(args.temperature, args.top_k, args.top_p, args.seed)
    if args.bytes < 1:
        raise ConfigError(f"--bytes must be at least 1, got {args.bytes}")
    enable_cache()
    opened = open_run(args.run, args.checkpoint)
    prompt = args.prompt.encode()
    console.print(printable(prompt), end="", markup=False)
    decoder, first = StreamDecoder(), None
    for byte in sample_bytes(opened.program, opened.ternary, prompt, args.bytes, sampling, packed=args.packed):
        first = first or time.perf_counter()
        console.print(decoder(byte), end="", markup=False)
        sys.stdout.flush()
    console.print()
    if first is not None and args.bytes > 1:
        rate = (args.bytes - 1) / (time.perf_counter() - first)
        errors.print(
            f"{args.bytes} bytes from {opened.path} at step {opened.step}; {rate:,.0f} bytes/s after the first"
        )
