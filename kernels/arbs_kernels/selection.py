"""Choosing the implementation of an operator: the best that works when none is named, the named one or an error."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arbs_kernels.backends import nothing_missing


class UnsupportedError(ValueError):
    """The named implementation cannot run these arguments on this machine; the message says what to pass instead."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator."""

    run: Callable[..., Any]
    """The operator, with the signature of its reference."""
    missing: Callable[[], str | None] = nothing_missing
    """What this machine lacks to run it, as a phrase that follows "needs"; None where it runs."""


def select(
    operator: str,
    implementations: Mapping[str, Implementation],
    implementation: str | None,
    preferred: Sequence[str] = (),
) -> Callable[..., Any]:
    """The function behind `implementation`; for None that of the first of `preferred` that runs here, or "xla".

    Raises:
        UnsupportedError: `implementation` names nothing in `implementations`, or what cannot run on this machine.
    """
    if implementation is None:
        runs = [name for name in preferred if name in implementations and implementations[name].missing() is None]
        return implementations[runs[0] if runs else "xla"].run
    if implementation not in implementations:
        raise UnsupportedError(
            f"{operator} has no implementation {implementation!r}; "
            f"pass one of {', '.join(sorted(implementations))}, or None"
        )
    missing = implementations[implementation].missing()
    if missing is not None:
        here = " or ".join(repr(name) for name, entry in implementations.items() if entry.missing() is None)
        raise UnsupportedError(f"{operator}: implementation {implementation!r} needs {missing}; pass {here}, or None")
    return implementations[implementation].run
