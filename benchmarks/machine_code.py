"""Kernels compiled for chips that are not there, and what their machine code says.

A stand-in driver answers triton's questions about the device, so the real launchers, given tensors without memory,
compile exactly what they would launch. The chip's own tools then report registers and instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {name: size * 1024 for name, size in {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}.items()}

FLOAT32 = ("FFMA", "FADD", "FMUL", "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FFMA2", "FADD2", "FMUL2")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class StandIn:
    """What triton asks of a driver before it compiles. Each target is a device of its own, so none sees another's."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._target)

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]


class Compiled(NamedTuple):
    """One kernel and what it takes.

    Attributes:
        tile: its constexpr sizes, as "128 x 64".
        spilled: bytes of local memory a thread; on AMD vector registers that spill.
        rounded: differences of pivots that are subtractions, in a forward for NVIDIA. Contracted with the product
            that a pivot is, they would rescale every sum by its rounding error, which no interpreter shows.
        float32: instructions of the loop over tiles without hidden entries, for each score; None without such a loop.
    """

    kernel: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    wgmma: int
    tcgen05: int
    rounded: int
    float32: float | None


def compile_for(target: str, launch: Callable[[], object]) -> list[Compiled]:
    """Every kernel that `launch` would run on the target; each is compiled and none is run."""
    found: list[tuple[str, Any, dict[str, Any]]] = []
    run, hip = triton.runtime.jit.JITFunction.run, torch.version.hip

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        found.append((kernel.__name__, compiled, options))
        return compiled

    driver.set_active(StandIn(target))
    triton.runtime.jit.JITFunction.run = compile_only
    torch.version.hip = "6" if TARGETS[target].backend == "hip" else None
    try:
        launch()
    finally:
        triton.runtime.jit.JITFunction.run, torch.version.hip = run, hip
    return [_read(*one) for one in found]


def _read(name: str, compiled: Any, options: dict[str, Any]) -> Compiled:
    sizes = [options[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK") if key in options]
    warps, score_loop, rounded = compiled.metadata.num_warps, None, 0
    if "cubin" in compiled.asm:
        usage = _dump(compiled.asm["cubin"], "-res-usage")
        registers, local, stack = (int(_first(rf"{key}:(\d+)", usage)) for key in ("REG", "LOCAL", "STACK"))
        spilled, code = max(local, stack), compiled.asm["ptx"]
        if name == "forward_kernel":
            bounded = re.findall(r"max\.f32\s+%\w+, (%\w+), 0fC3800000", code)
            rounded = sum(re.search(rf"sub(?:\.rn)?\.f32\s+{register},", code) is not None for register in set(bounded))
            score_loop = _float32_of_a_score(_dump(compiled.asm["cubin"], "-sass"), sizes[0] * sizes[1] / (32 * warps))
    else:
        code = compiled.asm["amdgcn"]
        registers, spilled = (int(_first(rf"\.{key}:\s+(\d+)", code)) for key in ("vgpr_count", "vgpr_spill_count"))
    return Compiled(
        kernel=name.removesuffix("_kernel").strip("_"),
        tile=" x ".join(map(str, sizes)),
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        wgmma=code.count("wgmma.mma_async"),
        tcgen05=code.count("tcgen05.mma"),
        rounded=rounded,
        float32=score_loop,
    )


def _float32_of_a_score(sass: str, scores: float) -> float | None:
    """Float32 instructions a score in the cheapest innermost loop that takes an exponential of every score.

    Args:
        sass: the kernel's machine code.
        scores: scores of a tile that a thread holds.
    """
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass, re.MULTILINE)
    lines = [(int(address, 16), name, rest) for address, name, rest in code]
    jumps = [(re.search(r"0x([0-9a-f]+)", rest), here) for here, name, rest in lines if name.startswith("BRA")]
    loops = [(int(to[1], 16), here) for to, here in jumps if to is not None and int(to[1], 16) <= here]
    counts = []
    for first, last in loops:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in loops):
            continue
        body = [name for here, name, _ in lines if first <= here <= last]
        exponentials = sum(name.startswith("MUFU.EX2") for name in body)
        if scores <= exponentials:
            counted = Counter(name.split(".")[0] for name in body)
            counts.append(sum(counted[name] for name in FLOAT32) / scores)
    return round(min(counts), 2) if counts else None


def _dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the tool's output: {text[:200]!r}")
    return match[1]
