"""What every benchmark here shares: interleaved repeats, medians, tables, and a record of what was measured where."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

Case = Callable[[], object]


def wall_seconds(case: Case) -> float:
    """How long one call takes by the clock on the wall."""
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def interleaved(
    cases: Mapping[str, Case], repeats: int, clock: Callable[[Case], float] = wall_seconds, slow: Iterable[str] = ()
) -> dict[str, list[float]]:
    """Time every case in turn, again and again, so that a machine that slows down slows all of them.

    Args:
        cases: what to call, by name.
        repeats: how often.
        clock: how long one call takes.
        slow: cases that are called every third time alone.
    """
    left_out, found = set(slow), {name: list[float]() for name in cases}
    for repeat in range(repeats):
        for name, case in cases.items():
            if not (name in left_out and repeat % 3):
                found[name].append(clock(case))
    return found


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The middle of each case's times."""
    return {name: statistics.median(taken) for name, taken in times.items() if taken}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)]


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of packages, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def write_record(folder: Path, name: str, record: object, page: Sequence[str] = ()) -> None:
    """Write `name`.json, and `name`.md where there is a page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if page:
        (folder / f"{name}.md").write_text("\n".join(page) + "\n")
