"""What a T2T module returns besides its tokens: a structure of its stages, their sizes and its input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...ops._common.windows import as_image


class Mismatch(Exception):
    """A module matches a rule and cannot be swapped; the text is the reason."""


class Template(NamedTuple):
    """The structure that a module returns, expressed in terms of its stages.

    Attributes:
        kind: "tuple", "list", "dict", "none", "input", "input size", "grid", "tokens" or "image".
        stage: of a grid, tokens or image.
        items: of a tuple or list its templates, of a dict pairs of key and template.
    """

    kind: str
    stage: int = 0
    items: tuple = ()

    def fill(self, x: torch.Tensor, stages: list) -> Any:
        """The structure with the values for an input and its stages, [(tokens, grid)]."""
        if self.kind == "tuple":
            return tuple(item.fill(x, stages) for item in self.items)
        if self.kind == "list":
            return [item.fill(x, stages) for item in self.items]
        if self.kind == "dict":
            return {key: item.fill(x, stages) for key, item in self.items}
        if self.kind in ("none", "input", "input size"):
            return {"none": None, "input": x, "input size": x.shape}[self.kind]
        tokens, grid = stages[self.stage]
        if self.kind == "tokens":
            return tokens
        return grid if self.kind == "grid" else as_image(tokens, grid)

    def __str__(self):
        if self.kind in ("tuple", "list"):
            return f"{self.kind} of {', '.join(map(str, self.items))}"
        if self.kind == "dict":
            return f"dict of {', '.join(f'{key}: {item}' for key, item in self.items)}"
        return self.kind if self.kind in ("none", "input", "input size") else f"{self.kind} {self.stage + 1}"


def recognised(value: Any, x: torch.Tensor, stages: list) -> Template:
    """The template that reproduces ``value``, which a module returned for ``x``, from its stages.

    Raises:
        Mismatch: a part of ``value`` is neither the input, nor one of the stages, nor a size of them.
    """
    if value is None:
        return Template("none")
    if isinstance(value, torch.Tensor):
        if torch.equal(value, x):
            return Template("input")
        for index, (tokens, grid) in enumerate(stages):
            image = as_image(tokens, grid)
            for kind, known in (("tokens", tokens), ("image", image)):
                if value.shape == known.shape and torch.allclose(value, known, rtol=1e-3, atol=1e-3):
                    return Template(kind, index)
        raise Mismatch(f"the original returns a tensor {tuple(value.shape)} that is none of its stages")
    if isinstance(value, torch.Size) and value == x.shape:
        return Template("input size")
    if isinstance(value, tuple) and all(type(n) is int for n in value):
        for index, (_, grid) in enumerate(stages):
            if value == tuple(grid):
                return Template("grid", index)
    elif type(value) in (tuple, list):
        return Template(type(value).__name__, 0, tuple(recognised(item, x, stages) for item in value))
    elif type(value) is dict:
        return Template("dict", 0, tuple((key, recognised(item, x, stages)) for key, item in value.items()))
    raise Mismatch(f"the original returns a {type(value).__name__} ({value!r:.40}) that is no size of its stages")
