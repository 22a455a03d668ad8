"""Times `attention` on this CPU beside torch's own kernel and beside materialising, in one interleaved run.

    python benchmarks/attention_cpu.py [--length 4096] [--heads 12] [--head-dim 64] [--repeats 9] [--out DIR]

Prints a Markdown table of medians, ratios of medians and memory; DIR/attention_cpu.json has these and the versions.
Every result is compared with the dense float64 computation first: no time is reported for a wrong one (exit code 1).
Memory is the growth of the process's peak over its inputs and outputs, each measured in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attnlab_kernels import Emit, Emitted, attention

from attnlab.runs.memory import peak_memory

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
ROWS = Emit(lse=True, entropy=True, max_probability=True, key_sum=True)
EVERYTHING = replace(ROWS, key_square=True, key_max=True)
SDPA, MATERIALISED = "scaled_dot_product_attention", "materialised: scores, softmax, entropy, column sums"
LEAN = "materialised with care: in place, fused entropy"
OURS = {
    "statistics off": Emit(),
    "lse, entropy, max_probability, key_sum": ROWS,
    "the same, key_square, key_max": EVERYTHING,
}


def materialise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Emitted]:
    """The usual way, each step over the whole matrix: transformers' eager path, and the entropy as most write it."""
    n = q.shape[-2]
    mask = torch.full((n, n), -math.inf).triu(1)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + mask
    lse = torch.logsumexp(scores, -1)
    a = torch.softmax(scores, -1)
    entropy = -(a * torch.log(a + 1e-12)).sum(-1)
    return a @ v, Emitted(lse=lse, entropy=entropy, max_probability=a.amax(-1), key_sum=a.sum(-2))


def materialise_with_care(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Emitted]:
    """The same numbers with as few matrices and passes as plain torch allows."""
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.mT
    scores.masked_fill_(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu_(1), -math.inf)
    top = scores.amax(-1)
    a = torch.softmax(scores, -1)
    largest = a.amax(-1)
    entropy = torch.special.entr(a, out=scores).sum(-1)
    return a @ v, Emitted(lse=top - largest.log(), entropy=entropy, max_probability=largest, key_sum=a.sum(-2))


def ours(emit: Emit, qkv: Tensors) -> tuple[torch.Tensor, Emitted]:
    """The tiled backend with some statistics."""
    return attention(*qkv, causal=True, emit=emit, backend="tiled")


def cases() -> dict[str, Callable[[Tensors], tuple[torch.Tensor, Emitted]]]:
    """What is timed, by the name it has in the table."""
    return {
        SDPA: lambda qkv: (torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True), Emitted()),
        **{name: partial(ours, emit) for name, emit in OURS.items()},
        MATERIALISED: lambda qkv: materialise(*qkv),
        LEAN: lambda qkv: materialise_with_care(*qkv),
    }


def inputs(args: argparse.Namespace) -> Tensors:
    """Random q, k, v of the size asked for."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.heads, args.length, args.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v


def disagreement(qkv: Tensors, results: dict[str, tuple[torch.Tensor, Emitted]]) -> list[str]:
    """Statistics that are further from float64 than 1e-5 of their largest value; head by head, to keep memory small."""
    wrong = set()
    for h in range(qkv[0].shape[1]):
        head = [t[:, h : h + 1].double() for t in qkv]
        exact = attention(*head, causal=True, emit=EVERYTHING, backend="dense")
        for name, (out, emitted) in results.items():
            pairs = {"out": (out, exact.out)}
            pairs |= {key: (value, getattr(exact.emitted, key)) for key, value in vars(emitted).items()}
            for key, (got, want) in pairs.items():
                if got is not None and want is not None:
                    error = (got[:, h : h + 1] - want).abs().max() / want.abs().max()
                    if not error <= 1e-5:
                        wrong.add(f"{name}: {key} is off by {float(error):.1e}")
    return sorted(wrong)


def peak_megabytes() -> float:
    """The largest resident size of this process so far."""
    return (peak_memory() or math.nan) / 2**20


def memory_of(name: str, args: argparse.Namespace, answer: Any) -> None:
    """Run one case in this process and send by how many megabytes its peak passed inputs and outputs."""
    small = argparse.Namespace(**vars(args) | {"length": 64})
    case = cases()[name]
    case(inputs(small))
    qkv = inputs(args)
    before = peak_megabytes()
    out, emitted = case(qkv)
    outputs = sum(t.nbytes for t in (out, *vars(emitted).values()) if t is not None) / 2**20
    answer.send(max(0.0, peak_megabytes() - before - outputs))


def fresh_memory(name: str, args: argparse.Namespace) -> float:
    """`memory_of` in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=memory_of, args=(name, args, there))
    process.start()
    there.close()
    megabytes = float(here.recv())
    process.join()
    return megabytes


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def main() -> int:
    """Check, time, measure memory, print."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    qkv, run = inputs(args), cases()
    wrong = disagreement(qkv, {name: case(qkv) for name, case in run.items()})
    if wrong:
        print("No times: results disagree with the dense float64 computation.", *wrong, sep="\n", file=sys.stderr)
        return 1
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for repeat in range(args.repeats):
        for name, case in run.items():
            if name in (MATERIALISED, LEAN) and repeat % 3:
                continue
            start = time.perf_counter()
            case(qkv)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {name: fresh_memory(name, args) for name in run}
    table = ["| causal, float32 | median s | min - max s | of SDPA | materialised takes | with care | memory MB |"]
    table.append("|---|---|---|---|---|---|---|")
    for name, middle in median.items():
        spread = f"{min(seconds[name]):.3f} - {max(seconds[name]):.3f}"
        ratios = (
            f"{middle / median[SDPA]:.2f} x | {median[MATERIALISED] / middle:.1f} x | {median[LEAN] / middle:.1f} x"
        )
        table.append(f"| {name} | {middle:.3f} | {spread} | {ratios} | {memory[name]:.0f} |")
    setup = f"{args.heads} heads, {args.length} tokens, {args.head_dim} columns; {torch.get_num_threads()} threads"
    print(f"{setup}; {cpu_name()}; torch {torch.__version__}", "", *table, sep="\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {
            "setup": {**vars(args), "out": None, "threads": torch.get_num_threads()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "cpu": cpu_name(),
            "seconds": seconds,
            "median": median,
            "of_sdpa": {name: middle / median[SDPA] for name, middle in median.items()},
            "materialised_takes": {name: median[MATERIALISED] / middle for name, middle in median.items()},
            "materialised_with_care_takes": {name: median[LEAN] / middle for name, middle in median.items()},
            "memory_megabytes": memory,
        }
        (args.out / "attention_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
