"""`arbs sample`: text from a run, streamed."""

import sys
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from arbs_jax.cli.display import console, errors
from arbs_jax.cli.options import CheckpointFlag, KernelFlag, RunFlag, real, whole
from arbs_jax.cli.runs import open_run
from arbs_jax.cli.text import StreamDecoder, printable, sample_bytes
from arbs_jax.compilation import enable_cache
from arbs_jax.errors import ConfigError
from arbs_jax.sampling import SamplingConfig


@dataclass(frozen=True)
class Sample:
    """Write text with a trained run, one position per new byte through a key/value cache."""

    run: RunFlag = None
    checkpoint: CheckpointFlag = None
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: a new line)")] = "\n"
    """Text to go on from."""
    bytes: Annotated[int, whole("--bytes")] = 512
    """How many bytes to write."""
    temperature: Annotated[float, real("--temperature")] = SamplingConfig.temperature
    """0 takes the likeliest byte every time."""
    top_k: Annotated[int, whole("--top-k")] = SamplingConfig.top_k
    """Draw from the k likeliest bytes; 0 from all."""
    top_p: Annotated[float, real("--top-p")] = SamplingConfig.top_p
    """Draw from the likeliest bytes that make up this probability."""
    seed: Annotated[int, whole("--seed")] = SamplingConfig.seed
    """Same seed, same text."""
    kernel: KernelFlag = None
    packed: bool = False
    """Multiply by packed weights, with scales made once: least memory. Large models on a GPU are faster so than with
    weights decoded once, a CPU is slower."""


def run(args: Sample) -> None:
    """Carries out `arbs sample`."""
    sampling = SamplingConfig(args.temperature, args.top_k, args.top_p, args.seed)
    if args.bytes < 1:
        raise ConfigError(f"--bytes must be at least 1, got {args.bytes}")
    # A word of the command line that is not UTF-8 holds its bytes as surrogates.
    prompt = args.prompt.encode(errors="surrogateescape")
    if not prompt:
        raise ConfigError("--prompt is empty; give at least one byte to go on from")
    enable_cache()
    opened = open_run(args.run, args.checkpoint, kernel=args.kernel)
    console.print(printable(prompt), end="")
    decoder, first = StreamDecoder(), None
    for byte in sample_bytes(opened.program, opened.state, prompt, args.bytes, sampling, packed=args.packed):
        first = first or time.perf_counter()
        console.print(decoder(byte), end="")
        sys.stdout.flush()
    console.print(decoder.end())
    if first is not None and args.bytes > 1:
        rate = (args.bytes - 1) / (time.perf_counter() - first)
        errors.print(
            f"{args.bytes} bytes from {opened.path} at step {opened.step}; {rate:,.0f} bytes/s after the first"
        )
