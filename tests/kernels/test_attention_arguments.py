"""What `attention` refuses, and that the package asks nothing of the machine when it is imported."""

import math
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from attnlab_kernels import Emit, RelativeBias, UnsupportedError, attention

Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 2, 7, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 0}, r"window is 0; expected at least 1"),
        ({"window": 2.5}, r"window is 2.5; expected a whole number"),
        ({"window": True}, r"window is True; expected a whole number"),
        ({"query_offset": 1.5}, r"query_offset is 1.5; expected a whole number"),
        ({"first_tokens": "4"}, r"first_tokens is '4'; expected a whole number"),
        ({"scale": math.nan}, r"scale is nan; expected a finite number"),
        ({"scale": np.float32("inf")}, r"scale is inf; expected a finite number"),
        ({"prefix": torch.full((2,), 1.5)}, r"prefix has dtype torch.float32; expected whole numbers of keys"),
        ({"emit": Emit(top_k=1.5)}, r"top_k is 1.5; expected a whole number"),
        ({"emit": Emit(pool=[2, 2.5])}, r"pool is 2.5; expected a whole number"),
        ({"relative_bias": RelativeBias(torch.zeros(8, 4), max_distance=9.5)}, r"max_distance of relative_bias is 9.5"),
        ({"first_tokens": -1}, r"first_tokens is -1; expected 0 or more"),
        ({"softcap": 0.0}, r"softcap is 0.0; expected a positive"),
        ({"normalizer": "relu"}, r"normalizer is 'relu'; expected 'softmax' or 'sigmoid'"),
        ({"normalizer": "sigmoid", "sinks": torch.zeros(4)}, r"sinks are a logit of the softmax"),
        ({"sigmoid_bias": 1.0}, r"sigmoid_bias is given with normalizer='softmax'"),
        ({"prefix": torch.zeros(3)}, r"prefix has shape \[3\]; expected \[2\]"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, r"key_mask has shape \[2, 5\]; expected \[2, 7\]"),
        ({"query_mask": torch.ones(2, 5)}, r"query_mask has dtype torch.float32; expected torch.bool"),
        ({"mask": torch.ones(2, 3, 5, 7, dtype=torch.bool)}, r"mask has shape .*; expected one that broadcasts to"),
        ({"mask": torch.ones(5, 7)}, r"mask has dtype torch.float32; expected torch.bool"),
        ({"bias": torch.ones(5, 6)}, r"bias has shape \[5, 6\]; expected one that broadcasts to \[2, 4, 5, 7\]"),
        ({"alibi": torch.ones(2)}, r"alibi has shape \[2\]; expected \[4\]"),
        ({"segments": torch.ones(2, 5)}, r"segments is one tensor for 5 queries and 7 keys"),
        ({"relative_bias": RelativeBias(torch.zeros(8, 3))}, r"table of shape \[8, 3\]; expected \[buckets, 4\]"),
        ({"backend": "cuda"}, r"backend is 'cuda'; expected one of auto, triton, tiled, dense"),
        ({"emit": Emit(top_k=0)}, r"top_k is 0; expected at least 1"),
        ({"emit": Emit(pool=0)}, r"pool has a block of 0"),
        ({"emit": Emit(offsets=[3, 1])}, r"offsets has edges that do not increase"),
        ({"emit": Emit(rows=torch.tensor([5]))}, r"rows holds an index outside -1 .. 4"),
        ({"emit": Emit(gather=torch.zeros(2, 7, 1, dtype=torch.long))}, r"gather has shape .*; expected \[2, 5, any\]"),
        ({"emit": Emit(columns=torch.zeros(1))}, r"columns has dtype torch.float32; expected int64"),
        ({"relative_bias": RelativeBias(torch.zeros(8, 4, device="meta"))}, r"relative_bias is on meta and q on cpu"),
        ({"segments": (Q[:, 0, :, 0], K[:, 0, :, 0].to("meta"))}, r"segments of keys is on meta and q on cpu"),
        ({"emit": Emit(rows=torch.zeros(1, device="meta"))}, r"rows is on meta and q on cpu"),
        ({"emit": Emit(key_probes=torch.zeros(5, 1))}, r"key_probes has shape \[5, 1\]; expected \[7, G\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value)[:40],
)
def test_an_argument_that_does_not_fit_is_named(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        attention(Q, K, K, **options)


def test_whole_numbers_of_numpy_and_torch_are_taken() -> None:
    own = attention(Q, K, K, causal=True, window=3, query_offset=1, first_tokens=2, emit=Emit(top_k=2, pool=3))
    theirs = attention(
        Q, K, K, causal=True, window=np.int64(3), query_offset=torch.tensor(1), first_tokens=np.int32(2),
        emit=Emit(top_k=np.int64(2), pool=torch.tensor(3)),
    )  # fmt: skip
    assert torch.equal(own.out, theirs.out)
    assert torch.equal(own.emitted.top_k_keys, theirs.emitted.top_k_keys)
    assert torch.equal(own.emitted.pooled, theirs.emitted.pooled)


@pytest.mark.parametrize(
    ("q", "k", "v", "sentence"),
    [
        (Q[0], K, K, r"q has shape \[4, 5, 8\]; expected \[batch"),
        (Q, K.double(), K, r"k has dtype torch.float64 and q torch.float32"),
        (Q, K[..., :7], K, r"k has shape .*; expected \[2, key heads, keys, 8\]"),
        (Q[:, :3], K, K, r"q has 3 heads and k has 2; expected a multiple"),
        (Q, K, K[:, :, :3], r"v has shape .*; expected \[2, 2, 7, columns\]"),
        (torch.randn(1, 1, 2, 300), torch.randn(1, 1, 2, 300), K, r"q has 300 columns a head; expected 1 to 256"),
    ],
)
def test_tensors_that_do_not_fit_are_named(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        attention(q, k, v)


@pytest.mark.skipif(find_spec("triton") is None, reason="its refusal needs triton")
def test_triton_refuses_double_precision_by_name_and_auto_does_without_it() -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"'triton' does not support float64; use backend='tiled'"):
        attention(q, k, v, backend="triton")
    assert attention(q, k, v).out.dtype == torch.float64


def test_without_triton_everything_but_its_backend_works() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, attnlab_kernels as a
assert not torch.cuda.is_initialized()
q, k, v = torch.randn(3, 1, 1, 4, 8)
a.attention(q, k, v, emit=a.Emit(entropy=True))
try:
    a.attention(q, k, v, backend="triton")
except a.UnsupportedError as error:
    assert "not installed" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_it_imports_no_library_but_torch() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import attnlab_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"attnlab_kernels", "torch"}, new
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_offset_beyond_what_positions_can_hold_is_refused() -> None:
    q, k, v = torch.randn(3, 1, 1, 3, 8)
    with pytest.raises(ValueError, match="query_offset is 2147483643; expected at most 1073741824"):
        attention(q, k, v, causal=True, query_offset=2**31 - 5)


def test_booleans_mark_two_documents() -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    marks = torch.tensor([[True, False, True, False]])
    for backend in ("dense", "tiled"):
        out = attention(q, k, v, segments=marks, backend=backend).out
        torch.testing.assert_close(out, attention(q, k, v, segments=marks.int(), backend="dense").out)
