"""Fixtures of the command line's tests: a compilation cache of their own, and runs that several tests look at."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import STEPS, Reference, call, flags


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all processes of the session, so that each program is compiled once; the user's is left alone."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("ARBS_CACHE_DIR")
    os.environ["ARBS_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["ARBS_CACHE_DIR"]
    else:
        os.environ["ARBS_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """`reference(rule, accum, steps)`: a run that was never interrupted, trained once a session."""
    made: dict[Reference, Reference] = {}

    def get(rule: str, accum: int, steps: int = STEPS) -> Reference:
        run = tmp_path_factory.getbasetemp() / f"reference-{rule}-{accum}-{steps}"
        wanted = Reference(run, rule, accum, steps)
        if wanted not in made:
            assert call("train", "--run", run, *flags(rule, accum, steps)) == 0
            made[wanted] = wanted
        return wanted

    return get


@pytest.fixture(scope="session")
def finished(reference: Callable[..., Reference]) -> Path:
    """Folder of a finished run, to be looked at and not written to."""
    return reference("integral", 2).run
