"""The goals for a Hopper GPU, each with the worst of what was measured for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_cases import BACKWARD, OFF

Line = Mapping[str, Any]
Key = tuple[object, ...]
SECOND_PASS = "pass: key sums, pooled map, logarithmic offsets"


def goals(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """(goal, worst measured, met or not met or not measured)."""
    timed = [line for line in lines if line["milliseconds"] is not None]
    long = [line for line in timed if line["keys"] >= 4096 and line["queries"] == line["keys"]]

    def flops(shape: str) -> list[float]:
        return [
            line["teraflops"]
            for line in long
            if (line["shape"], line["mask"], line["variant"]) == (shape, "full", OFF) and line["teraflops"]
        ]

    def slower(one: str, other: str) -> list[float]:
        return _ratios(long, one, other)

    return [
        _goal("statistics off, D 128, full, from 4k: at least 460 TFLOP/s", flops("D 128"), 460, at_least=True),
        _goal("statistics off, D 64, full, from 4k: at least 390 TFLOP/s", flops("D 64"), 390, at_least=True),
        _goal("SDPA's flash backend takes at least 1.25 times as long", slower("SDPA flash", OFF), 1.25, at_least=True),
        _goal("SDPA's cuDNN backend takes at least as long", slower("SDPA cuDNN", OFF), 1.0, at_least=True),
        _goal("row statistics: at most 1.05 times off", slower("row statistics", OFF), 1.05),
        _goal("with collision: at most 1.08 times off", slower("+ collision", OFF), 1.08),
        _goal("with argmax too: at most 1.15 times off", slower("+ collision, argmax", OFF), 1.15),
        _goal(
            "16 key probes: at most 1.12 times row statistics",
            slower("row statistics, 16 key probes", "row statistics"),
            1.12,
        ),
        _goal("statistics pass: at most 0.6 times the forward", slower(SECOND_PASS, OFF), 0.6),
        _goal(
            "materialising takes at least 20 times as long at 8k",
            [ratio for key, ratio in _by_case(timed, "materialised", "row statistics").items() if key[-1] == 8192],
            20,
            at_least=True,
        ),
        _goal(
            "runs at 128k",
            [1.0 for line in timed if line["keys"] == line["queries"] == 131072 and line["variant"] == OFF],
            1.0,
            at_least=True,
            show=lambda value: "yes",
        ),
        _goal("backward: at most 2.5 times the forward", slower(BACKWARD, OFF), 2.5),
    ]


def _goal(
    name: str,
    values: Sequence[float],
    bound: float,
    at_least: bool = False,
    show: Callable[[float], str] = lambda value: f"{value:.3g}",
) -> tuple[str, str, str]:
    if not values:
        return name, "", "not measured"
    worst = min(values) if at_least else max(values)
    met = worst >= bound if at_least else worst <= bound
    return name, show(worst), "met" if met else "not met"


def _by_case(lines: Sequence[Line], one: str, other: str) -> dict[Key, float]:
    """How much longer one variant takes than another, for each case that has both."""
    times: dict[str, dict[Key, float]] = {one: {}, other: {}}
    for line in lines:
        if line["variant"] in times:
            key = (line["shape"], line["mask"], line["batch"], line["queries"], line["keys"])
            times[line["variant"]][key] = line["milliseconds"]
    return {key: taken / times[other][key] for key, taken in times[one].items() if key in times[other]}


def _ratios(lines: Sequence[Line], one: str, other: str) -> list[float]:
    return list(_by_case(lines, one, other).values())
