"""Proof without a GPU: the shipped configurations compile for four chips, fit them, and stay in their budgets.

Run with `python benchmarks/compile_kernels.py`; it prints a table and fails on a broken promise. With `--out DIR` it
writes `compiled.md` and `compiled.json` there. `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from compile_cases import CASES, LAUNCH, Case
from machine_code import SHARED_LIMIT, Compiled, compile_for

BUDGETS = {
    "entropy": ("off", 1.25),
    "entropy, collision": ("off", 2.5),
    "argmax": ("rows", 3.0),
    "all": ("collision", 3.0),
}
"""Float32 instructions a score that a set of statistics may take beyond a smaller one; bf16 on sm_90."""

Result = tuple[Case, list[Compiled]]


def compiled(case: Case) -> Result:
    """A case's kernels; in a process of its own, whose driver is a stand-in."""
    return case, compile_for(case.target, lambda: LAUNCH[case.kernel](case))


def broken_promises(results: list[Result]) -> Iterator[str]:
    """Every promise that does not hold, in words."""
    for case, kernels in results:
        name = " ".join(map(str, case))
        if not kernels:
            yield f"{name}: nothing was compiled"
        half = case.dtype != "fp32"
        for kernel in kernels:
            if kernel.shared > SHARED_LIMIT[case.target]:
                yield f"{name}: {kernel.kernel} takes {kernel.shared} bytes of shared memory"
            if case.kernel == "forward" and half and kernel.spilled:
                yield f"{name}: {kernel.kernel} spills {kernel.spilled}"
            if kernel.kernel == "forward" and half and case.target == "sm_90" and not kernel.wgmma:
                yield f"{name}: no wgmma"
            # A thread holds two rows of each 16 of a warp, and the loop stands there twice.
            rows = 2 * int(kernel.tile.split(" x ")[0]) // (8 * kernel.warps) if kernel.wgmma else 0
            if kernel.kernel == "forward" and kernel.rounded < rows:
                yield f"{name}: {rows - kernel.rounded} of {rows} differences of pivots are contracted"
    spent = {
        (case.d, case.variant): kernels[0].float32
        for case, kernels in results
        if (case.kernel, case.target, case.dtype, case.option) == ("forward", "sm_90", "bf16", "causal")
    }
    for (d, variant), instructions in spent.items():
        if variant not in BUDGETS:
            continue
        smaller, allowed = BUDGETS[variant]
        base = spent.get((d, smaller))
        if base is None or instructions is None:
            yield f"{variant} or {smaller} at D {d}: no loop found to count instructions in"
        elif instructions - base > allowed + 0.005:
            yield f"{variant} at D {d}: {instructions - base:.2f} float32 instructions a score beyond {smaller}"


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    heads = ("kernel", "emitted", "pattern", "dtype", "D", "target", "tile", "warps", "stages", "registers")
    heads += ("spilled", "shared KiB", "wgmma", "tcgen05", "float32 / score")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for case, kernels in results:
        for found in kernels:
            cells = (found.kernel, case.variant, case.option, case.dtype, case.d, case.target, found.tile, found.warps)
            cells += (found.stages, found.registers, found.spilled, f"{found.shared / 1024:.1f}", found.wgmma or "")
            cells += (found.tcgen05 or "", "" if found.float32 is None else f"{found.float32:.2f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _as_json(results: list[Result], versions: dict[str, str], broken: list[str]) -> dict[str, Any]:
    rows = [case._asdict() | {"kernels": [one._asdict() for one in kernels]} for case, kernels in results]
    return {"versions": versions, "broken": broken, "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for compiled.md and compiled.json")
    parser.add_argument("--only", default="", help="compile the cases whose name holds this")
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.only in " ".join(map(str, case))]
    # Not forked: a copy of torch's threads would not run.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compiled, cases))
    broken = [] if arguments.only else list(broken_promises(results))
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    text = table(results)
    print(text)
    print("\n".join(["", *broken]) if broken else f"\n{sum(len(kernels) for _, kernels in results)} kernels hold.")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        stated = ", ".join(f"{name} {version}" for name, version in versions.items())
        intro = f"By `python benchmarks/compile_kernels.py`, {stated}, without a GPU."
        (arguments.out / "compiled.md").write_text(f"# What the kernels compile to\n\n{intro}\n\n{text}\n")
        content = json.dumps(_as_json(results, versions, broken), indent=1)
        (arguments.out / "compiled.json").write_text(content + "\n")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
