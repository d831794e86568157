"""Fixtures of the command line's tests: a compilation cache of their own, and runs that several tests look at."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import STEPS, Reference, call, flags


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the session that all of its workers see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(shared: Path) -> Iterator[Path]:
    """One cache for all processes of the session, so that each program is compiled once; the user's is left alone."""
    folder = shared / "cache"
    before = os.environ.get("ARBS_CACHE_DIR")
    os.environ["ARBS_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["ARBS_CACHE_DIR"]
    else:
        os.environ["ARBS_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def reference(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """`reference(rule, accum, steps)`: a run never interrupted, trained once a session and copied by each worker."""

    def get(rule: str, accum: int, steps: int = STEPS) -> Reference:
        name = f"reference-{rule}-{accum}-{steps}"
        run, whole = tmp_path_factory.getbasetemp() / "copies" / name, shared / f"{name}-whole"
        if not run.exists():
            with (shared / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not whole.exists():
                    assert call("train", "--run", shared / name, *flags(rule, accum, steps)) == 0
                    (shared / name).rename(whole)
            shutil.copytree(whole, run)
        return Reference(run, rule, accum, steps)

    return get


@pytest.fixture(scope="session")
def finished(reference: Callable[..., Reference]) -> Path:
    """Folder of a finished run, to be looked at and not written to."""
    return reference("integral", 2).run
