"""What operations on masks in closed form mean: `tril`, `~`, `&`, `<=`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnlab.capture.masks import MaskForm
from attnlab.lens.lazy import Lazy, Recipe
from attnlab.lens.terms import Additive, Entries, number_of, term_of


def _lower(recipe: Recipe) -> Any:
    lazy, diagonal = recipe.args[0], recipe.argument(1, "diagonal", 0)
    term = term_of(lazy)
    if not isinstance(term, Entries) or lazy.dim() != 2 or term.form.causal or term.hidden:
        return None
    return lazy.like(Entries(MaskForm(True, diagonal)), recipe)


def _inverted(recipe: Recipe) -> Any:
    mask = recipe.args[0]
    term = term_of(mask)
    if not isinstance(term, Entries):
        return None
    return Lazy.of(Entries(term.form, not term.hidden), recipe, mask.shape, torch.bool, mask.device)


def _both(recipe: Recipe) -> Any:
    mask, other = recipe.args[:2]
    term = term_of(mask)
    row = isinstance(other, Tensor) and term_of(other) is None and other.dtype == torch.bool and other.dim() == 4
    if not isinstance(term, Entries) or term.hidden or not row or other.shape[1:3] != (1, 1):
        return None
    keys = other[:, 0, 0] if term.form.padding is None else term.form.padding & other[:, 0, 0]
    form = replace(term.form, padding=None if bool(keys.all()) else keys)
    shape = torch.broadcast_shapes(mask.shape, other.shape)
    return Lazy.of(Entries(form), recipe, shape, torch.bool, mask.device)


def _at_most(recipe: Recipe) -> Any:
    mask, limit = recipe.args[0], number_of(recipe.args[1])
    term = term_of(mask)
    if not isinstance(term, Additive) or limit is None or not term.hidden <= limit < 0:
        return None
    return mask.like(Entries(term.form, hidden=True), recipe, torch.bool)


def square_of_ones(recipe: Recipe, frame: object) -> Any:
    """A square of True that `tril` makes causal."""
    sizes = recipe.args[0] if len(recipe.args) == 1 and isinstance(recipe.args[0], (tuple, list)) else recipe.args
    if len(sizes) != 2 or recipe.kwargs.get("dtype") is not torch.bool or recipe.kwargs.get("out") is not None:
        return None
    device = torch.device(recipe.kwargs.get("device") or torch.get_default_device())
    return Lazy.of(Entries(MaskForm(False, sizes[1] - sizes[0])), recipe, sizes, torch.bool, device)


MASK_RULES: dict[str, Callable[[Recipe], Any]] = {
    "tril": _lower,
    **dict.fromkeys(("invert", "bitwise_not", "logical_not"), _inverted),
    **dict.fromkeys(("and", "bitwise_and", "logical_and"), _both),
    **dict.fromkeys(("le", "less_equal"), _at_most),
}
"""By the function's name, see `attnlab.lens.algebra`."""
