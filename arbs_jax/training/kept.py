"""What the layers of a stack keep between forward and backward, of every micro-batch."""

from collections.abc import Callable
from typing import Any

import jax


class Kept:
    """Where it lies.

    It is written into memory that nothing has filled, where a scan that stacks its outputs would first write zeros to
    all of it; what several products keep, such as the input of three, is written once; and a value lies flat, lest the
    compiler give the two loops different layouts and turn whole stacks round between them.
    """

    def __init__(self, layers: int, micro: int):
        self._layers, self._micro = layers, micro
        self._places: list[int] = []
        self._shapes: list[jax.ShapeDtypeStruct] = []
        self._structure: Any = None  # it holds a program, equal to itself alone: that of the last trace counts

    def _distinct(self, kept: Any) -> list[jax.Array]:
        leaves, self._structure = jax.tree.flatten(kept)
        distinct = list({id(leaf): leaf for leaf in leaves}.values())
        self._places = [next(at for at, leaf in enumerate(distinct) if leaf is one) for one in leaves]
        return distinct

    def room(self, layer: Callable[..., Any], *arguments: Any) -> list[jax.Array]:
        """Room for what `layer(*arguments)` returns, a tree, of every layer and micro-batch."""
        self._shapes = jax.eval_shape(lambda *arrays: self._distinct(layer(*arrays)), *arguments)
        return [jax.lax.empty((self._layers * self._micro, leaf.size), leaf.dtype) for leaf in self._shapes]

    def put(self, room: list[jax.Array], kept: Any, layer: jax.Array, number: jax.Array) -> list[jax.Array]:
        """The room with what a layer keeps of the `number`th micro-batch."""
        place = layer * self._micro + number
        return [
            jax.lax.dynamic_update_index_in_dim(whole, value.reshape(-1), place, 0)
            for whole, value in zip(room, self._distinct(kept), strict=True)
        ]

    def get(self, room: list[jax.Array], layer: jax.Array, number: jax.Array) -> Any:
        """What `put` was given."""
        place = layer * self._micro + number
        own = [jax.lax.dynamic_index_in_dim(whole, place, keepdims=False) for whole in room]
        shaped = [value.reshape(leaf.shape) for value, leaf in zip(own, self._shapes, strict=True)]
        return jax.tree.unflatten(self._structure, [shaped[place] for place in self._places])
