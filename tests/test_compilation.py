"""The persistent cache: where it lies, and what `measured` counts."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from arbs_jax import compilation
from arbs_jax.compilation import CompileReport, enable_cache, measured, step_options

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """JAX keeps one cache a process: closed before and after, and its options put back."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_folder_is_the_one_named_else_the_environments_else_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ARBS_CACHE_DIR", str(tmp_path / "environment"))
    assert enable_cache(str(tmp_path / "named")) == tmp_path / "named"
    assert enable_cache() == tmp_path / "environment"
    monkeypatch.delenv("ARBS_CACHE_DIR")
    assert enable_cache() == tmp_path / "home" / ".cache" / "arbs_jax"
    monkeypatch.chdir(tmp_path)
    assert enable_cache("relative") == tmp_path / "relative"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "relative")


def test_a_program_is_compiled_once_and_then_read_back(tmp_path: Path):
    enable_cache(str(tmp_path))

    def compiled() -> jax.stages.Compiled:
        """Traced anew each time, so that JAX does not remember it within the process."""
        return jax.jit(lambda x: x * 3 + 1).lower(jax.ShapeDtypeStruct((5,), jnp.int32)).compile()

    # A program as small as this counts too: by default JAX keeps only what took a second.
    with measured() as first:
        compiled()
    with measured() as second:
        program = compiled()
    assert (first.hits, first.misses, first.cached) == (0, 1, False)
    assert (second.hits, second.misses, second.cached) == (1, 0, True)
    assert "compiled" in str(first)
    assert "from the cache" in str(second)
    assert program(jnp.arange(5, dtype=jnp.int32)).tolist() == [1, 4, 7, 10, 13]
    with measured() as third:
        pass
    jax.jit(lambda x: x * 5).lower(jax.ShapeDtypeStruct((5,), jnp.int32)).compile()
    assert (third.hits, third.misses) == (0, 0)


def test_one_miss_among_hits_is_no_cached_start():
    assert CompileReport(hits=3).cached
    assert not CompileReport(hits=3, misses=1).cached
    assert not CompileReport().cached
    assert str(CompileReport(1.25, 0, 2)) == "1.2 s (compiled)"


def test_a_step_has_options_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "compute_capability", lambda: 0.0)
    assert step_options(cudnn_attention=True, in_one_graph=True) is None
    monkeypatch.setattr(compilation, "compute_capability", lambda: 9.0)
    repeatable = {"xla_gpu_exclude_nondeterministic_ops": True}
    assert step_options(cudnn_attention=True, in_one_graph=False) == repeatable
    # Options are set by name whatever the device, so that this XLA's word is good for a GPU too.
    faster = step_options(cudnn_attention=False, in_one_graph=True)
    assert faster == compilation._FASTER
    assert "WHILE" in faster["xla_gpu_enable_command_buffer"].split(",")
    assert step_options(cudnn_attention=True, in_one_graph=True) == repeatable | faster


def test_options_that_this_compiler_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "compute_capability", lambda: 9.0)
    unknown = {"xla_gpu_enable_command_buffer": "FUSION,NONSENSE", "xla_gpu_no_such_option": True}
    monkeypatch.setattr(compilation, "_FASTER", unknown | {"xla_gpu_enable_pdl_launch": False})
    assert step_options(cudnn_attention=False, in_one_graph=True) == {"xla_gpu_enable_pdl_launch": False}
