"""Times `attention` on a GPU beside torch's own kernels and beside materialising, interleaved in one run.

    python benchmarks/attention_gpu.py [--quick] [--budget SECONDS] [--tokens 16384] [--out DIR]
    TRITON_INTERPRET=1 python benchmarks/attention_gpu.py --toy     # the same code at toy sizes, without a GPU

Prints Markdown tables of medians and the goals with what was measured; DIR/attention_gpu.json and .md hold them with
versions, clocks and date. Work is 4 B H Nq (mean keys a query sees) D operations. Before each repeat the caches are
flushed. No time is reported for a wrong result (exit code 1): see `gpu_oracle.py`. Needs torch, triton and
attnlab_kernels alone. Exit code 2: no GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from attnlab_kernels import Emit, attention
from attnlab_kernels.errors import UnsupportedError
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem
from gpu_cases import (
    BACKWARD,
    LENGTHS,
    MASKS,
    OFF,
    SHAPES,
    TOY_SHAPE,
    Inputs,
    Mask,
    Options,
    Shape,
    Size,
    UnsuitedError,
    flex,
    forward_emits,
    fused,
    materialised,
    pass_emits,
)
from gpu_goals import goals
from gpu_oracle import Oracle
from timing import interleaved, table, today, versions, wall_seconds, write_record
from torch.nn.attention import SDPBackend

WRONG = "WRONG"
FLUSHED_BYTES = 256 << 20
DECODE_QUERIES = (1, 4, 16)


@dataclass
class Measured:
    """One line of the table: what, on what, and the time in milliseconds or the reason why there is none."""

    shape: str
    mask: str
    batch: int
    queries: int
    keys: int
    variant: str
    milliseconds: float | None = None
    teraflops: float | None = None
    of_off: float | None = None
    times: list[float] = field(default_factory=list)
    reason: str = ""


class Machine:
    """Where cases run: how a call is timed there, and what its clocks say."""

    def __init__(self, toy: bool) -> None:
        self.toy, self.device = toy, "cuda" if torch.cuda.is_available() else "cpu"
        self.cuda = self.device == "cuda"
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda") if self.cuda else None

    def milliseconds(self, case: Callable[[], object]) -> float:
        """The time of one call, by the device's own clock."""
        if self._flushed is None:
            return 1e3 * wall_seconds(case)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        begin.record()
        case()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def rest(self) -> None:
        """Let the device cool down between cases, and give memory back."""
        if self.cuda:
            torch.compiler.reset()  # each case compiles anew; kept, they would pass the limit and run uncompiled
            torch.cuda.empty_cache()
            time.sleep(0.25)

    def name(self) -> str:
        """The device, in words."""
        return torch.cuda.get_device_name() if self.cuda else "triton's interpreter on a CPU: the times mean nothing"

    def clocks(self) -> str:
        """Clock, power and temperature now."""
        if not self.cuda:
            return "none"
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
        try:
            return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            return f"unknown ({type(error).__name__})"


class Budget:
    """How long the run may take; the case that would not fit is left out, with all that follow."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.begun, self.longest = seconds, time.monotonic(), 0.0

    def allows(self) -> bool:
        """Whether a case as long as the longest so far still fits."""
        spent = time.monotonic() - self.begun
        return self.seconds is None or spent + self.longest < self.seconds


@dataclass(frozen=True)
class Case:
    """A shape, a mask and a size, on which every variant and peer runs."""

    shape: Shape
    mask: Mask
    size: Size

    def __str__(self) -> str:
        queries = "" if self.size.queries == self.size.keys else f"{self.size.queries} queries, "
        return f"{self.shape.name}, {self.mask.name}, {queries}{self.size.keys} keys"

    def line(self, variant: str, reason: str = "") -> Measured:
        """An empty line of the table."""
        size = self.size
        return Measured(self.shape.name, self.mask.name, size.batch, size.queries, size.keys, variant, reason=reason)

    def operations(self, backward: bool) -> float:
        """Of the two matrix products of a forward, or the five of a backward."""
        visible = self.mask.visible(self.size)
        return (2.5 if backward else 1) * 4 * self.size.batch * self.shape.heads * visible * self.shape.head_dim


def plan(args: argparse.Namespace) -> Iterator[Case]:
    """All cases, those that the goals speak of first."""
    if args.toy:
        for name in args.masks or ("causal", "sink + window"):
            yield Case(TOY_SHAPE, MASKS[name], Size(1, 40, 40))
        if not args.masks:
            yield Case(TOY_SHAPE, MASKS["full"], Size(1, 2, 40))
        return
    lengths = (
        (4096, 16384) if args.quick else (4096, 8192, 16384, *(n for n in LENGTHS if n not in (4096, 8192, 16384)))
    )
    masks = ("full", "causal", "sink + window") if args.quick else tuple(MASKS)
    shapes = tuple(args.shapes)
    chosen = [name for name in masks if not args.masks or name in args.masks]
    for length in lengths:
        for name in chosen:
            for shape in shapes:
                yield Case(SHAPES[shape], MASKS[name], Size(max(1, args.tokens // length), length, length))
    if "full" in chosen:
        for keys in (16384,) if args.quick else (4096, 16384, 131072):
            for queries in DECODE_QUERIES:
                for shape in shapes:
                    size = Size(max(1, args.tokens // keys), queries, keys)
                    yield Case(SHAPES[shape], MASKS["full"], size)


def measure(case: Case, args: argparse.Namespace, machine: Machine) -> list[Measured]:
    """Check every variant, then time all of them and the peers in turn."""
    options = case.mask.options(case.size, machine.device)
    x = Inputs.draw(case.shape, case.size, args.dtype, machine.device)
    lines: list[Measured] = []
    runs: dict[str, Callable[[], object]] = {}
    oracle = Oracle(x.qkv, options)
    emits = forward_emits(case.size, machine.device)
    everything = [(name, emit, False) for name, emit in emits.items()]
    everything += [(name, emit, True) for name, emit in pass_emits(case.size).items()]
    for name, emit, alone in everything:
        try:
            wrong = oracle.wrong(*ours(x, options, emit), emit)
            if not wrong:
                runs[name] = statistics_pass(x, options, emit) if alone else forward(x, options, emit)
        except Exception as error:
            lines.append(case.line(name, failure(error)))
            continue
        if wrong:
            lines.append(case.line(name, f"{WRONG}: {'; '.join(wrong)}"))
    if case.size.queries == case.size.keys:
        add_backwards(case, x, options, oracle, machine, runs, lines)
    for name, make in peers(case, x, machine).items():
        try:
            runs[name] = make()
            runs[name]()
        except Exception as error:
            runs.pop(name, None)
            lines.append(case.line(name, reason(error)))
    slow = [name for name in runs if name.startswith("materialised")]
    times = interleaved(runs, args.repeats, machine.milliseconds, slow)
    off = statistics.median(times[OFF]) if times.get(OFF) else None
    measured = []
    for name, taken in times.items():
        line, middle = case.line(name), statistics.median(taken)
        line.milliseconds, line.times = middle, taken
        line.of_off = None if off is None else middle / off
        if not name.startswith("pass"):
            line.teraflops = case.operations(BACKWARD in name) / middle / 1e9
        measured.append(line)
    return measured + lines


def ours(x: Inputs, options: Options, emit: Emit) -> tuple[torch.Tensor, object]:
    """One call of the kernels."""
    return attention(*x.qkv, **options, emit=emit, backend="triton")


def forward(x: Inputs, options: Options, emit: Emit) -> Callable[[], object]:
    """A call as a user makes it."""
    return lambda: ours(x, options, emit)


def statistics_pass(x: Inputs, options: Options, emit: Emit) -> Callable[[], object]:
    """The second pass alone, on the normalisers that a forward left."""
    from attnlab_kernels.gpu.launch_forward import run_forward
    from attnlab_kernels.gpu.launch_statistics import run_statistics

    problem, request = resolve_request(emit, resolve_problem(*x.qkv, **options))
    rows = run_forward(problem, request, keep_rows=True).rows
    if rows is None:
        raise UnsuitedError("the forward left no normalisers")
    return lambda: run_statistics(problem, request, rows)


def add_backwards(
    case: Case,
    x: Inputs,
    options: Options,
    oracle: Oracle,
    machine: Machine,
    runs: dict[str, Callable[[], object]],
    lines: list[Measured],
) -> None:
    """Backward passes alone: ours, checked, and the peers' on the same inputs."""
    leaves = Inputs(*(t.detach().requires_grad_() for t in x.qkv), grad=x.grad)
    makers = {BACKWARD: lambda: lambda: ours(leaves, options, Emit())[0]}
    makers |= {
        f"{name}, {BACKWARD}": make for name, make in peers(case, leaves, machine).items() if "mater" not in name
    }
    for name, make in makers.items():
        try:
            out = make()()
            run = backward(out, leaves)
            wrong = oracle.wrong_gradients(run(), x.grad) if name == BACKWARD else run() and []
        except Exception as error:
            lines.append(case.line(name, failure(error) if name == BACKWARD else reason(error)))
            continue
        if wrong:
            lines.append(case.line(name, f"{WRONG}: {'; '.join(wrong)}"))
        else:
            runs[name] = run


def backward(out: torch.Tensor, leaves: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Gradients of q, k, v, again and again from one forward."""
    return lambda: torch.autograd.grad(out, leaves.qkv, leaves.grad, retain_graph=True)


def peers(case: Case, x: Inputs, machine: Machine) -> dict[str, Callable[[], Callable[[], torch.Tensor]]]:
    """Torch's own kernels and materialising, each as what makes the call."""
    mask, size = case.mask, case.size
    found: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {}
    if machine.cuda:
        found["SDPA flash"] = lambda: fused(SDPBackend.FLASH_ATTENTION, x, mask, size)
        found["SDPA cuDNN"] = lambda: fused(SDPBackend.CUDNN_ATTENTION, x, mask, size)
        found["FlexAttention"] = lambda: flex(x, mask, size, compiled=True)
    else:
        found["SDPA math"] = lambda: fused(SDPBackend.MATH, x, mask, size)
    found["materialised"] = lambda: materialised(x, mask, size)
    return found


def reason(error: Exception) -> str:
    """Why there is no time, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return text[:160] if isinstance(error, UnsuitedError) else f"{type(error).__name__}: {text[:160]}"


def failure(error: Exception) -> str:
    """The same of our own kernels, which are to run unless they say what they lack or memory ends."""
    named = isinstance(error, (UnsuitedError, UnsupportedError, torch.OutOfMemoryError))
    return reason(error) if named else f"{WRONG}: {reason(error)}"


def page(lines: list[Measured], record: dict[str, object]) -> list[str]:
    """The tables and goals as Markdown."""
    text = [f"# Attention on a GPU, {record['date']}", "", str(record["setup"]), ""]
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for line in lines:
        groups.setdefault((line.shape, line.mask, line.batch, line.queries, line.keys), []).append(line)
    for (shape, mask, batch, queries, keys), members in groups.items():
        text += [f"## {shape}, {mask}, batch {batch}, {queries} queries, {keys} keys", ""]
        header = ("", "median ms", "TFLOP/s", "of statistics off")
        text += [*table(header, (cells(line) for line in members)), ""]
    left_out = record["left_out"]
    if isinstance(left_out, list) and left_out:
        text += ["## Left out for want of time", "", *(f"- {name}" for name in left_out), ""]
    text += ["## Goals", "", *table(("goal", "measured", ""), goals([asdict(line) for line in lines]))]
    return text


def cells(line: Measured) -> tuple[str, ...]:
    """A line of a table."""
    if line.milliseconds is None:
        return line.variant, line.reason, "", ""
    flops = (
        "" if line.teraflops is None else f"{line.teraflops:.0f}" if line.teraflops >= 1 else f"{line.teraflops:.1e}"
    )
    return line.variant, f"{line.milliseconds:.4g}", flops, "" if line.of_off is None else f"{line.of_off:.3f} x"


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few lengths and masks")
    parser.add_argument("--toy", action="store_true", help="toy sizes, in triton's interpreter where there is no GPU")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no case begins")
    parser.add_argument("--tokens", type=int, choices=(16384, 32768), default=16384, help="batch times length")
    parser.add_argument("--masks", nargs="*", choices=tuple(MASKS), default=[])
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(given)
    args.repeats = args.repeats or (2 if args.toy else 10 if args.quick else 30)
    # In the interpreter products of bfloat16 are wrong.
    args.dtype = getattr(torch, args.dtype or ("float16" if args.toy else "bfloat16"))
    return args


def main(given: list[str] | None = None) -> int:
    """Check, time, print, record."""
    args = arguments(given)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not (args.toy and interpreted):
        print("There is no GPU here: `TRITON_INTERPRET=1 python benchmarks/attention_gpu.py --toy` runs the same code.")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    machine, budget = Machine(args.toy), Budget(args.budget)
    if not machine.cuda:
        print("Triton's interpreter on a CPU: the times mean nothing.")
    lines: list[Measured] = []
    left_out: list[str] = []
    before = machine.clocks()
    for case in plan(args):
        if left_out or not budget.allows():
            left_out.append(str(case))
            continue
        start = time.monotonic()
        try:
            lines += measure(case, args, machine)
        except Exception as error:
            lines.append(case.line("all", failure(error)))
        machine.rest()
        budget.longest = max(budget.longest, time.monotonic() - start)
        print(f"{case}: {time.monotonic() - start:.0f} s, clocks {machine.clocks()}", file=sys.stderr, flush=True)
    found = versions("torch", "triton")
    setup = f"{machine.name()}; {args.dtype}; clocks before: {before}, after: {machine.clocks()}; medians of "
    setup += f"{args.repeats}; {', '.join(f'{name} {version}' for name, version in found.items())}"
    record: dict[str, object] = {"date": today(), "setup": setup, "versions": found, "device": machine.name()}
    record |= {"clocks_before": before, "clocks_after": machine.clocks(), "left_out": left_out}
    text = page(lines, record)
    print("\n".join(text))
    if args.out is not None:
        record["goals"] = goals([asdict(line) for line in lines])
        write_record(args.out, "attention_gpu", record | {"measured": [asdict(line) for line in lines]}, text)
    wrong = [line for line in lines if line.reason.startswith(WRONG)]
    for line in wrong:
        print(f"{line.shape}, {line.mask}, {line.keys} keys, {line.variant}: {line.reason}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
