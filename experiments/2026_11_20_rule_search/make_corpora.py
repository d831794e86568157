"""Write the corpora into a folder: tinyshakespeare, Python's topics text, and the standard library's source.

The third is large enough (about 10 MB) that 2000 steps of 64x128 bytes see it less than twice: no run overfits it.
"""

import hashlib
import pathlib
import sys
import sysconfig
from pydoc_data.topics import topics


def main(out, shakespeare):
    out = pathlib.Path(out)
    out.mkdir(exist_ok=True)
    (out / "tinyshakespeare.txt").write_bytes(pathlib.Path(shakespeare).read_bytes())
    (out / "pydoc.txt").write_bytes("\n".join(topics.values()).encode())
    lib = pathlib.Path(sysconfig.get_path("stdlib"))
    skip = ("test", "tests", "site-packages", "idle_test", "encodings", "pydoc_data", "__pycache__")
    files = [p for p in lib.rglob("*.py") if not set(p.relative_to(lib).parts) & set(skip)]
    files.sort(key=lambda p: hashlib.md5(str(p.relative_to(lib)).encode()).hexdigest())  # a fixed shuffle
    (out / "pycode.txt").write_bytes(b"\n".join(p.read_bytes() for p in files))
    for p in sorted(out.iterdir()):
        print(p.name, p.stat().st_size, hashlib.md5(p.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:3])
