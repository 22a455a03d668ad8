"""The triton backend: its numbers in the interpreter, its code for a GPU, and what it refuses.

The interpreter replaces triton's own functions when triton is imported, so it runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attnlab_kernels import Emit, UnsupportedError, attention

pytest.importorskip("triton")
HERE = Path(__file__).parent


def test_its_numbers_are_those_of_dense() -> None:
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", HERE / "triton_cases.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_it_compiles_for_hopper_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "compile_forward.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for case in json.loads(done.stdout):
        assert case["LOCAL"] == 0, case
        assert case["shared"] <= 227 * 1024, case
        assert case["STACK"] == 0, case
        assert case["wgmma"] > 0 or case["case"][1] == "fp32", case


@pytest.mark.parametrize(
    ("name", "options", "emit"),
    [
        ("window", {"window": 3}, Emit()),
        ("softcap", {"softcap": 3.0}, Emit()),
        ("sinks", {"sinks": torch.zeros(1)}, Emit()),
        ("key_mask", {"key_mask": torch.tensor([[True, False, True]])}, Emit()),
        ("key_sum", {}, Emit(key_sum=True)),
        ("top_k", {}, Emit(top_k=1)),
    ],
)
def test_what_it_does_not_have_is_refused_by_name_and_done_by_auto(name: str, options: dict, emit: Emit) -> None:
    q, k, v = torch.randn(3, 1, 1, 3, 8)
    with pytest.raises(UnsupportedError, match=f"'triton' does not support {name} yet"):
        attention(q, k, v, **options, emit=emit, backend="triton")
    attention(q, k, v, **options, emit=emit, backend="auto")
