"""Pictures of digits in a grid, and questions about them in words, with the cell that answers each.

    grids = attnlab.tasks.digit_grids(model, 64)
    logits = model.hf(**grids.inputs).logits

A picture has 3 x 3 cells of 8 x 8 pixels. A cell shows one of scikit-learn's digits (Alpaydin and Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository 1998, https://doi.org/10.24432/C50P49) or nothing.
There are two forms of questions: which digit stands in a cell, and in which cell a digit stands. Patches of 4 x 4
pixels make four image tokens of each cell, so which image tokens hold the answer is known for every question: what a
text token should look at. The task, its words and its forms are our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.errors import AttnlabError, DataError
from attnlab.tasks.base import ragged, read_count
from attnlab.tasks.tokens import Encoder, render

if TYPE_CHECKING:
    from attnlab.verify.digits_vit import HeldOut

Form = Literal["digit", "cell"]
"""What a question asks for."""

SIDE, CELL, PATCH = 3, 8, 4
"""Cells in a row, pixels of a cell, pixels of a patch."""
PATCHES = SIDE * CELL // PATCH
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = (
    "top-left", "top-middle", "top-right", "middle-left", "center", "middle-right", "bottom-left", "bottom-middle",
    "bottom-right",
)  # fmt: skip
"""The cells, row by row."""
QUESTIONS: Mapping[Form, str] = {"digit": "which digit is in the {ASKED} cell ?", "cell": "where is the {ASKED} ?"}
"""The forms, by what they ask for."""
BLANK = -1


@dataclass(frozen=True, eq=False)
class DigitGrids:
    """Pictures with a question each.

    Attributes:
        questions: [E] in words, without the image tokens that stand before them.
        forms: [E] `digit` or `cell`: what is asked for.
        pixel_values: [E, 1, 24, 24] from -1 (paper) to 1 (ink).
        input_ids: [E, N] start token, 36 image tokens, question; padded on the right.
        attention_mask: [E, N] booleans.
        contents: [E, 9] the digit in each cell of the picture, -1 where there is none.
        cells: [E] number of the cell that the question is about.
        digits: [E] the digit that stands there.
        answers: [E] token ids of what is right: the digit's word or the cell's.
        positions: [E] by name: `ASKED`, the word that names the cell or the digit, and `END`, the last token, where the
            answer is read.
        cell_tokens: [9, 4] where each cell's image tokens are in the text.
    """

    questions: tuple[str, ...]
    forms: tuple[str, ...]
    pixel_values: Float[Tensor, "E 1 24 24"] = field(repr=False)
    input_ids: Int[Tensor, "E N"] = field(repr=False)
    attention_mask: Bool[Tensor, "E N"] = field(repr=False)
    contents: Int[Tensor, "E 9"]
    cells: Int[Tensor, " E"]
    digits: Int[Tensor, " E"]
    answers: Int[Tensor, " E"]
    positions: Mapping[str, Int[Tensor, " E"]] = field(repr=False)
    cell_tokens: Int[Tensor, "9 4"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes."""
        return {
            "pixel_values": self.pixel_values,
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask.long(),
        }

    @property
    def gold_tokens(self) -> Int[Tensor, "E 4"]:
        """Where the image tokens are that hold the answer."""
        return self.cell_tokens[self.cells]

    @property
    def cell_columns(self) -> Float[Tensor, "N 9"]:
        """1 where a token of the text is an image token of a cell: as key probes, the attention to each cell.

        Example:
            >>> import attnlab
            >>> from attnlab.tasks import digit_grids
            >>> model = attnlab.load_model("vlm-mini", device="cpu")
            >>> grids = digit_grids(model, 4)
            >>> emit = lambda site: attnlab.Emit(key_probes=grids.cell_columns) if site.kind == "self" else None
            >>> with attnlab.capture(model, emit=emit) as session:
            ...     logits = model.hf(**grids.inputs).logits
            >>> to_cells = session.calls[-1].emitted.key_probes[torch.arange(4), :, grids.positions["END"]]
            >>> to_cells.shape  # of each question and head, the attention from the last token to each cell
            torch.Size([4, 4, 9])
        """
        columns = torch.zeros(self.input_ids.shape[1], len(CELLS))
        for cell, tokens in enumerate(self.cell_tokens):
            columns[tokens, cell] = 1
        return columns

    def solved(self, logits: Float[Tensor, "E N V"]) -> Bool[Tensor, " E"]:
        """Whether the likeliest token of the whole vocabulary at `END` is the answer."""
        last = logits[torch.arange(len(self), device=logits.device), self.positions["END"].to(logits.device)]
        return last.argmax(-1) == self.answers.to(logits.device)

    def blanked(self) -> DigitGrids:
        """The same questions about empty pictures: what the words alone tell."""
        empty = torch.full_like(self.pixel_values, -1)
        return replace(self, pixel_values=empty, contents=torch.full_like(self.contents, BLANK))

    def shuffled(self, seed: int = 0) -> DigitGrids:
        """The same questions, each about the picture of another; `contents` follows the pictures, `answers` does not.

        Raises:
            ValueError: there is only one.
        """
        if len(self) < 2:
            raise ValueError("There is one picture; expected at least two, so that each question gets another's.")
        order = np.random.default_rng(seed).permutation(len(self))
        other = torch.empty(len(self), dtype=torch.long)
        other[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, 1))
        return replace(self, pixel_values=self.pixel_values[other], contents=self.contents[other])


def digit_grids(
    tokenizer: Any,
    n: int = 64,
    *,
    seed: int | Sequence[int] = 0,
    form: Form | Literal["both"] = "both",
    digits: Literal["held_out", "train"] | HeldOut = "held_out",
    blank: float = 0.25,
) -> DigitGrids:
    """Pictures of digits in a grid with a question each.

    Cells and digits asked for come equally often (counts differ by one at most), and so do the two forms. Where a digit
    is to be found it stands in one cell only; where a cell is asked for, its digit may stand elsewhere too.

    Args:
        tokenizer: of transformers with an image token, or a `Model` that has one, such as `vlm-mini`.
        n: number of pictures.
        seed: of all that is drawn; one number or several.
        form: `digit`: which digit is in a cell; `cell`: where a digit is; or `both`, by turns.
        digits: `held_out`: the images that ship with `digits-vit`, from which no shipped model has learned; `train`:
            all others of scikit-learn's; or images of one's own.
        blank: share of the other cells that show nothing.

    Raises:
        AttnlabError: training digits are asked for and scikit-learn is not installed.
        DataError: the tokenizer has no image token, or lacks words of the task.
        ValueError: an argument that is no such thing.

    Example:
        >>> from attnlab import load_model
        >>> model = load_model("vlm-mini", device="cpu")
        >>> grids = digit_grids(model, 64, form="digit")
        >>> grids.questions[0], grids.pixel_values.shape  # doctest: +ELLIPSIS
        ('which digit is in the ... cell ?', torch.Size([64, 1, 24, 24]))
        >>> grids.contents[torch.arange(64), grids.cells].equal(grids.digits)
        True
        >>> float(grids.solved(model.hf(**grids.inputs).logits).float().mean()) > 0.8
        True
    """
    from attnlab.verify.digits_vit import HeldOut

    if form not in (*QUESTIONS, "both"):
        raise ValueError(f"form is {form!r}; expected 'digit', 'cell' or 'both'.")
    if not 0 <= blank <= 1:
        raise ValueError(f"blank is {blank}; expected a share from 0 to 1.")
    images = digits if isinstance(digits, HeldOut) else digit_images(digits)
    encoder, rng = Encoder(tokenizer), np.random.default_rng(seed)
    count = read_count(n)
    several: tuple[Form, ...] = tuple(QUESTIONS) if form == "both" else (form,)
    forms = [several[i % len(several)] for i in range(count)]
    cells, shown = _evenly(rng, len(CELLS), count), _evenly(rng, len(DIGITS), count)
    contents = _contents(rng, forms, cells, shown, blank)
    asked = [CELLS[c] if f == "digit" else DIGITS[d] for f, c, d in zip(forms, cells, shown, strict=True)]
    right = [DIGITS[d] if f == "digit" else CELLS[c] for f, c, d in zip(forms, cells, shown, strict=True)]
    written = _Words(encoder, _image_token(tokenizer, encoder))
    lines = [written.prompt(f, word) for f, word in zip(forms, asked, strict=True)]
    lengths = torch.tensor([len(line.ids) for line in lines])
    ids = ragged([line.ids for line in lines], 0)
    grid = torch.arange(PATCHES**2).reshape(PATCHES, PATCHES) + len(encoder.start)
    per_cell = CELL // PATCH
    return DigitGrids(
        questions=tuple(line.question for line in lines),
        forms=tuple(forms),
        pixel_values=_pictures(rng, images, contents),
        input_ids=ids,
        attention_mask=torch.arange(ids.shape[1]) < lengths[:, None],
        contents=torch.from_numpy(contents),
        cells=torch.from_numpy(cells),
        digits=torch.from_numpy(shown),
        answers=torch.tensor([written.answers[word] for word in right]),
        positions={"ASKED": torch.tensor([line.asked for line in lines]), "END": lengths - 1},
        cell_tokens=grid.unfold(0, per_cell, per_cell).unfold(1, per_cell, per_cell).reshape(len(CELLS), -1),
    )


def digit_images(part: Literal["held_out", "train"]) -> HeldOut:
    """The digits' images [N, 8, 8] of 0 to 16, and the digits that they show [N], both uint8.

    Args:
        part: `held_out`: those that ship with `digits-vit`; `train`: all others, by scikit-learn.

    Raises:
        AttnlabError: training digits are asked for and scikit-learn is not installed.
        ValueError: there is no such part.

    Example:
        >>> digit_images("held_out").images.shape
        torch.Size([449, 8, 8])
    """
    from attnlab.models.shipped import shipped_path
    from attnlab.verify.digits_vit import HeldOut, held_out

    if part not in ("held_out", "train"):
        raise ValueError(f"digits is {part!r}; expected 'held_out', 'train' or images with their labels.")
    aside = held_out(shipped_path("digits-vit"))
    if part == "held_out":
        return aside
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise AttnlabError(
            "The training digits come from scikit-learn, which is not installed: pip install 'attnlab[models]', or use "
            "the held-out digits, which ship with attnlab."
        ) from error
    found = load_digits()
    unseen = {image.numpy().tobytes() for image in aside.images}
    images = found.images.astype(np.uint8)
    kept = np.array([image.tobytes() not in unseen for image in images])
    return HeldOut(torch.from_numpy(images[kept]), torch.from_numpy(found.target[kept].astype(np.uint8)))


def _evenly(rng: np.random.Generator, of: int, count: int) -> np.ndarray:
    """Numbers below `of`, each equally often, in random order."""
    rounds = [rng.permutation(of) for _ in range(-(-count // of))]
    return rng.permutation(np.concatenate(rounds)[:count])


def _contents(
    rng: np.random.Generator, forms: Sequence[str], cells: np.ndarray, shown: np.ndarray, blank: float
) -> np.ndarray:
    """[E, 9] a digit or -1 for each cell; where a digit is to be found, the others differ from it."""
    shape = (len(forms), len(CELLS))
    any_digit, another = rng.integers(10, size=shape), (shown[:, None] + rng.integers(1, 10, size=shape)) % 10
    contents = np.where(np.array(forms)[:, None] == "cell", another, any_digit)
    contents[rng.random(shape) < blank] = BLANK
    contents[np.arange(len(forms)), cells] = shown
    return contents


def _pictures(rng: np.random.Generator, images: HeldOut, contents: np.ndarray) -> Tensor:
    """[E, 1, 24, 24] each cell an image drawn among those that show its digit."""
    from attnlab.verify.digits_vit import DARKEST, pixels

    shape = list(images.images.shape)
    if (
        not len(images.labels)
        or shape != [len(images.labels), CELL, CELL]
        or images.images.min() < 0
        or images.images.max() > DARKEST
    ):
        raise ValueError(
            f"The digits are images of shape {shape} with {len(images.labels)} labels; expected [N, {CELL}, {CELL}] of "
            f"0 (paper) to {DARKEST} (ink), and N labels."
        )
    labels = images.labels.numpy()
    counts = np.bincount(labels, minlength=len(DIGITS))
    if len(counts) > len(DIGITS) or not counts.all():
        raise ValueError(f"The images show the digits {sorted(set(labels.tolist()))}; expected each from 0 to 9.")
    order, first = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts
    wanted = contents.clip(min=0)
    drawn = order[first[wanted] + (rng.random(contents.shape) * counts[wanted]).astype(int)]
    cells = images.images[torch.from_numpy(drawn)].masked_fill(torch.from_numpy(contents == BLANK)[..., None, None], 0)
    laid = cells.reshape(-1, SIDE, SIDE, CELL, CELL).transpose(2, 3)
    return pixels(laid.reshape(-1, SIDE * CELL, SIDE * CELL))


@dataclass(frozen=True)
class _Prompt:
    """A question in tokens, and where the word is that it asks about."""

    question: str
    ids: list[int]
    asked: int


class _Words:
    """The task's words in a tokenizer's tokens; there are only 19 questions, so each is written once."""

    def __init__(self, encoder: Encoder, image: int) -> None:
        self._encoder = encoder
        self._picture = [image] * PATCHES**2
        self._known: dict[tuple[Form, str], _Prompt] = {}
        self.answers = {
            **encoder.words(DIGITS, "digits' words", len(DIGITS), "the grid of digits"),
            **encoder.words(CELLS, "cells' names", len(CELLS), "the grid of digits"),
        }

    def prompt(self, form: Form, word: str) -> _Prompt:
        key = (form, word)
        if key not in self._known:
            one = render(QUESTIONS[form], {"ASKED": word})
            ids = self._encoder.prompt([one])
            asked = self._encoder.places([one], ids, [["ASKED"]])[0]["ASKED"]
            start = len(self._encoder.start)
            whole = [*ids[0][:start], *self._picture, *ids[0][start:]]
            self._known[key] = _Prompt(one.text, whole, asked + len(self._picture))
        return self._known[key]


def _image_token(tokenizer: Any, encoder: Encoder) -> int:
    inner = getattr(tokenizer, "tokenizer", None) or tokenizer
    found = getattr(inner, "image_token_id", None)
    if not isinstance(found, int):
        raise DataError(
            f"{encoder.name} has no image token; expected that of a model that reads pictures, such as vlm-mini."
        )
    return found
