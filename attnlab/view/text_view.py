"""`TextView`: the attention of every head on one short text, and the page that shows one head of it at a time.

Weights are kept as one byte each on a square-root scale of their row's largest, so that small weights keep their
digits: the error is at most sqrt(weight x largest) / 255.
"""

from __future__ import annotations

import hashlib
import html
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from attnlab.plots.metrics import KINDS
from attnlab.view.markup import POLICY, asset, base64_of, script_json

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class KindView:
    """One kind of attention on the text.

    Attributes:
        kind: `self`, `encoder` or `cross`.
        weights: [layers, heads, R queries, N keys] float32, NaN-free; 0 for heads that a layer does not have.
        heads: number of heads in each layer.
        queries, keys: the tokens as they are shown.
    """

    kind: str
    weights: np.ndarray
    heads: tuple[int, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TextView:
    """Attention of all heads on one text; a notebook shows it as a page to point and click at.

    Attributes:
        title: what the page is called, the model's name.
        kinds: what there is to see, by kind of attention.
        note: what the reader should know, for example how much of the text is shown.
    """

    title: str
    kinds: Mapping[str, KindView]
    note: str = ""

    @property
    def patterns(self) -> np.ndarray:
        """[layers, heads, R, N] weights of the first kind, `self` wherever there is one."""
        return next(iter(self.kinds.values())).weights

    def fragment(self, identifier: str | None = None, *, with_assets: bool = True) -> str:
        """The view as a piece of a page.

        Args:
            identifier: of its element; must be unique on the page, and is by itself when None.
            with_assets: whether style and script come along; one piece of a page must bring them.
        """
        identifier = identifier if identifier is not None else self._fresh_identifier()
        name = html.escape(identifier, quote=True)
        assets = f"<style>{asset('attnlab.view', 'view.css')}</style>" if with_assets else ""
        code = f"<script>{asset('attnlab.view', 'view.js')}</script>" if with_assets else ""
        plain = "".join(f"<span>{html.escape(token)} </span>" for token in next(iter(self.kinds.values())).queries)
        return (
            f'{assets}<section class="av" id="{name}" aria-label="Attention of one head">'
            f'<noscript><p class="av-plain">{plain}</p></noscript></section>'
            f'<script type="application/json" id="{name}-data">{script_json(self._data())}</script>'
            f"{code}<script>attnlabView({script_json(identifier)});</script>"
        )

    def html(self) -> str:
        """A whole page that needs nothing else."""
        title = html.escape(self.title)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}: attention</title></head>"
            f'<body class="av-page">{self.fragment("view")}</body></html>'
        )

    def _repr_html_(self) -> str:
        # A frame of its own: notebooks run scripts in their own ways, and styles would leak both ways.
        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Attention of one head" '
            f'style="width:100%;height:{self._height()}px;border:0"></iframe>'
        )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{kind} {list(view.weights.shape)}" for kind, view in self.kinds.items())
        return f"TextView({self.title!r}, {shapes})"

    def _fresh_identifier(self) -> str:
        digest = hashlib.sha256("\0".join(next(iter(self.kinds.values())).queries).encode("utf-8", "replace"))
        return f"av-{digest.hexdigest()[:8]}-{next(_numbers)}"

    def _height(self) -> int:
        tokens = max(sum(len(t) + 1 for t in view.queries + view.keys) for view in self.kinds.values())
        layers = max(len(view.heads) for view in self.kinds.values())
        return int(np.clip(max(330 + 30 * tokens / 70, 240 + 19 * layers), 470, 900))

    def _data(self) -> dict[str, object]:
        return {"title": self.title, "note": self.note, "kinds": [_packed(view) for view in self.kinds.values()]}


def _packed(view: KindView) -> dict[str, object]:
    largest = view.weights.max(axis=-1) if view.weights.size else np.zeros(view.weights.shape[:-1], np.float32)
    relative = view.weights / np.where(largest > 0, largest, 1.0)[..., None]
    return {
        "kind": view.kind,
        "label": KINDS.get(view.kind, view.kind),
        "heads": list(view.heads),
        "most": view.weights.shape[1],
        "queries": list(view.queries),
        "keys": list(view.keys),
        "weights": base64_of(np.rint(255 * np.sqrt(relative.clip(0, 1))).astype(np.uint8)),
        "largest": base64_of(largest.astype(np.float32)),
    }
