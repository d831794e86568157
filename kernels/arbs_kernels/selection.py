"""Choosing the implementation of an operator: the best that works when none is named, the named one or an error."""

from collections.abc import Callable, Mapping


class UnsupportedError(ValueError):
    """The named implementation cannot run these arguments on this machine; the message says what to pass instead."""


def select(
    operator: str, implementations: Mapping[str, Callable], implementation: str | None, preferred: str = "xla"
) -> Callable:
    """The function behind `implementation`, or the preferred one for `None`.

    Raises:
        UnsupportedError: `implementation` names nothing in `implementations`.
    """
    name = preferred if implementation is None else implementation
    if name not in implementations:
        raise UnsupportedError(
            f"{operator} has no implementation {name!r}; pass one of {', '.join(sorted(implementations))}, or None"
        )
    return implementations[name]
