"""Texts that every machine with Python has, and files."""

import sysconfig
from pathlib import Path

from arbs_jax.data import Corpus, memory_corpus, open_corpus


def load(name: str) -> Corpus:
    """`pydoc`: the language documentation; `pycode`: the standard library's source; anything else is a path."""
    if name == "pydoc":
        return open_corpus(None)
    if name == "pycode":
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "encodings"}
        files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
        return memory_corpus("pycode", b"\n".join(path.read_bytes() for path in files))
    return open_corpus(name)
