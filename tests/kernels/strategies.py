"""Problems to check backends on: drawn ones, and the tensors that named ones are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from attnlab_kernels import Emit, RelativeBias
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ROW_STATISTICS = ("lse", "entropy", "max_probability", "argmax", "collision", "visible")
KEY_STATISTICS = ("key_sum", "key_square", "key_max")
LISTED = ("key_probes", "query_probes", "gather", "rows", "columns", "pool", "offsets", "top_k", "head_gram")
STATISTICS = ROW_STATISTICS + KEY_STATISTICS + LISTED


class Case(NamedTuple):
    """A call of `attention`: q, k, v, its options, and the statistics asked for."""

    qkv: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]
    emit: Emit

    def to(self, dtype: torch.dtype) -> Case:
        """The call with every floating-point tensor in a precision; probes in no lower one than float32."""
        probes = torch.float64 if dtype == torch.float64 else torch.float32
        changed = {name: cast(getattr(self.emit, name), probes) for name in ("key_probes", "query_probes")}
        options = {name: cast(value, dtype) for name, value in self.options.items()}
        return Case(tuple(t.to(dtype) for t in self.qkv), options, replace(self.emit, **changed))  # type: ignore[arg-type]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A value with its floating-point tensors in a precision."""
    if isinstance(value, RelativeBias):
        return value._replace(table=value.table.to(dtype))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def every(names: tuple[str, ...], b: int, n_q: int, n_k: int, pool: int | tuple[int, ...] = 7) -> Emit:
    """The named statistics, with probes and indices of their own."""
    asked: dict[str, Any] = dict.fromkeys((*ROW_STATISTICS, *KEY_STATISTICS, "head_gram"), True)
    asked |= {
        "key_probes": torch.randn(b, n_k, 2, dtype=torch.float64, device=DEVICE),
        "query_probes": torch.randn(n_q, 2, dtype=torch.float64, device=DEVICE),
        "gather": torch.randint(-1, n_k, (b, n_q, 3), device=DEVICE),
        "rows": torch.randint(-1, n_q, (2,), device=DEVICE),
        "columns": torch.randint(-1, n_k, (b, 2), device=DEVICE),
        "pool": pool,
        "offsets": ([-5, -1, 0, 1, 4, 50], [0, 2]),
        "top_k": 4,
    }
    return Emit(**{name: asked[name] for name in names})


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[int, ...] = (1, 3, 16, 33, 70), statistics: tuple[str, ...] = ()) -> Case:
    """Drawn shapes, masks and options in float64; the statistics named, or drawn ones where none is named."""
    size = st.sampled_from(sizes)
    b, n, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_q = draw(size)
    n_k = draw(st.one_of(st.just(n_q), size))
    d, dv, h = draw(st.integers(1, 20)), draw(st.integers(1, 20)), n * group
    torch.manual_seed(draw(st.integers(0, 2**31)))
    double = {"dtype": torch.float64, "device": DEVICE}
    loud = draw(st.sampled_from([1.0, 4.0]))
    q = torch.randn(b, h, n_q, d, **double) * loud
    k, v = torch.randn(b, n, n_k, d, **double), torch.randn(b, n, n_k, dv, **double)

    def holds(*shape: int) -> Tensor:
        return torch.rand(*shape, device=DEVICE) < 0.7

    def documents(length: int, packed: bool) -> Tensor:
        ids = torch.randint(0, 3, (b, length), device=DEVICE)
        return ids.sort(1).values if packed else ids

    packed = draw(st.booleans())
    made = {
        "causal": lambda: True,
        "query_offset": lambda: draw(st.integers(-5, 40)),
        "window": lambda: draw(st.integers(1, 40)),
        "first_tokens": lambda: draw(st.integers(0, 5)),
        "prefix": lambda: torch.randint(0, n_k + 1, (b,), device=DEVICE),
        "segments": lambda: (documents(n_q, packed), documents(n_k, packed)),
        "key_mask": lambda: holds(b, n_k),
        "query_mask": lambda: holds(b, n_q),
        "mask": lambda: holds(b, draw(st.sampled_from([1, h])), n_q, n_k),
        "bias": lambda: torch.randn(h, 1, n_k, **double).masked_fill(~holds(h, 1, n_k), draw(_HIDDEN_OR_NOT)),
        "alibi": lambda: torch.rand(h, **double),
        "relative_bias": lambda: RelativeBias(torch.randn(8, h, **double), draw(st.booleans()), 20),
        "softcap": lambda: 2.0,
        "sinks": lambda: torch.randn(h, **double),
        "scale": lambda: draw(st.sampled_from([3.0, -0.5])),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(made)), unique=True, max_size=5))
    options = {name: made[name]() for name in chosen}
    if "sinks" not in options and draw(st.booleans()):
        options |= {"normalizer": "sigmoid", "sigmoid_bias": -1.0}
    names = statistics or tuple(draw(st.lists(st.sampled_from(STATISTICS), unique=True, min_size=1, max_size=9)))
    pool = draw(st.sampled_from([1, 4, 7, (4, 7), 100]))
    return Case((q, k, v), options, every(names, b, n_q, n_k, pool))


_HIDDEN_OR_NOT = st.sampled_from([0.0, -torch.inf])
