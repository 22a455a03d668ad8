"""Compiles the triton forward for a chip that is not there and prints what it used; run as a script by the tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from attnlab_kernels.triton_forward import attention_forward_kernel, choose_launch, padded
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(head_dim: int, dtype: str, arch: int, statistics: tuple[str, ...]) -> dict[str, int]:
    size = 4 if dtype == "fp32" else 2
    launch = choose_launch(head_dim, head_dim, size, argmax="ARGMAX" in statistics, probes="PROBES" in statistics)
    switches = ("LSE", "ENTROPY", "MAX_PROBABILITY", "ARGMAX", "COLLISION", "PROBES")
    constants: dict[str, object] = {name: name in statistics for name in switches}
    constants |= {"GROUP": 4, "CAUSAL": True, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    constants |= {"BLOCK_D": padded(head_dim), "BLOCK_DV": padded(head_dim), "BLOCK_G": 16}
    constants["PROBE_PRECISION"] = "tf32x3"
    types = {"f": "*fp32", "argmax": "*i64", "c": "fp32"} | dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "entropy", "max_probability", "collision", "probes"), "*fp32")
    names = attention_forward_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [[("tt.divisibility", 16)], ("q", "k", "v", "f", "out", "s_qn", "s_kn", "s_vn", "n_d", "n_dv")]
    attributes = {(names.index(name),): aligned[0] for name in aligned[1]}
    # A stride of 1 is what triton itself specialises on; without it no load is coalesced.
    constants |= dict.fromkeys(("s_qd", "s_kd", "s_vd"), 1)
    signature |= dict.fromkeys(("s_qd", "s_kd", "s_vd"), "constexpr")
    source = ASTSource(attention_forward_kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    found = {"shared": kernel.metadata.shared, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")}
    return found | resources(kernel.asm["cubin"])


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory (spills), as the chip's own tool reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "LOCAL", "STACK")}


ROWS = ("LSE", "ENTROPY", "MAX_PROBABILITY")
CASES: list[tuple[int, str, int, tuple[str, ...]]] = [
    (64, "bf16", 90, ROWS),
    (64, "fp16", 90, (*ROWS, "COLLISION", "ARGMAX")),
    (64, "bf16", 90, (*ROWS, "COLLISION", "ARGMAX", "PROBES")),
    (128, "bf16", 90, ()),
    (128, "bf16", 90, ROWS),
    (128, "bf16", 90, (*ROWS, "COLLISION")),
    (128, "bf16", 90, (*ROWS, "ARGMAX", "COLLISION", "PROBES")),
    (128, "bf16", 90, (*ROWS, "ARGMAX")),
    (256, "bf16", 90, (*ROWS, "ARGMAX", "COLLISION")),
    (256, "bf16", 90, (*ROWS, "PROBES")),
    (64, "fp32", 90, ROWS),
    (64, "fp32", 90, (*ROWS, "ARGMAX")),
]

if __name__ == "__main__":
    results = [{"case": case, **compiled(*case)} for case in CASES]
    sys.stdout.write(json.dumps(results))
