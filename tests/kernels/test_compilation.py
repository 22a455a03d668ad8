"""What the kernels compile to, for chips that are not there, and every choice of tile sizes that is shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from attnlab_kernels import Emit, attention, autotune
from attnlab_kernels.gpu import autotune as tuner
from attnlab_kernels.gpu.architecture import (
    ADA,
    AMPERE,
    ARCHITECTURES,
    BLACKWELL,
    CDNA,
    HOPPER,
    Architecture,
    architecture_named,
    architecture_of,
)
from attnlab_kernels.gpu.configs import Launch, forward_launch, forward_launches
from attnlab_kernels.gpu.launch_forward import run_forward
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem
from attnlab_kernels.tuning import autotune_enabled
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .error_bound import assert_as_exact_as_dense, flat, poisoned_memory, run
from .strategies import DEVICE, Case

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results"
ROWS = Emit(lse=True, entropy=True, max_probability=True, collision=True, visible=True)
FORWARD_LAUNCHES = sorted(
    {
        launch
        for architecture in ARCHITECTURES
        for width in (64, 128, 256)
        for element_size in (2, 4)
        for probes in (0, 16, 64)
        for launch in forward_launches(architecture, width, width, element_size, False, probes)
    }
)


@pytest.mark.slow
def test_every_shipped_configuration_compiles_fits_its_chip_and_stays_in_its_budget(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "compile_kernels.py", "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    fresh, committed = (json.loads((folder / "compiled.json").read_text()) for folder in (tmp_path, COMMITTED))
    assert _structure(fresh) == _structure(committed), "run benchmarks/compile_kernels.py --out benchmarks/results"


def _structure(table: dict) -> list[tuple]:
    names = ("kernel", "variant", "target", "dtype", "d", "option")
    return [
        (*(case[name] for name in names), *((one["kernel"], one["tile"], one["warps"]) for one in case["kernels"]))
        for case in table["cases"]
    ]


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 16, device=DEVICE) for n in (23, 150, 150))
    return Case((2 * q, k, v), {"causal": True}, ROWS)


def assert_right(case: Case, out: Tensor, found: dict[str, Tensor]) -> None:
    exact, dense = run(case.to(torch.float64), "dense"), run(case, "dense")
    assert_as_exact_as_dense(out, dense[0], exact[0], "out")
    low, high = flat(dense[1]), flat(exact[1])
    for name, value in found.items():
        assert_as_exact_as_dense(value, low[name], high[name], name)


@pytest.mark.parametrize("launch", FORWARD_LAUNCHES, ids=lambda launch: "x".join(map(str, launch)))
def test_every_tile_size_of_the_table_gives_the_same_numbers(case: Case, launch: Launch) -> None:
    problem, request = resolve_request(case.emit, resolve_problem(*case.qkv, **case.options))
    with poisoned_memory():
        out, found, _ = run_forward(problem, request, False, launch)
    assert_right(case, out, found)


@pytest.mark.parametrize(
    ("backend", "arch", "architecture"),
    [
        ("cuda", 80, AMPERE),
        ("cuda", 86, ADA),
        ("cuda", 89, ADA),
        ("cuda", 90, HOPPER),
        ("cuda", 100, BLACKWELL),
        ("cuda", 103, BLACKWELL),
        ("cuda", 120, ADA),
        ("hip", "gfx942", CDNA),
    ],
)
def test_a_chip_belongs_to_an_architecture(backend: str, arch: int | str, architecture: Architecture) -> None:
    assert architecture_named(backend, arch) == architecture


def test_the_interpreter_needs_no_chip() -> None:
    assert architecture_of(torch.zeros(1)) == HOPPER


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: f"{one.family} {one.shared // 1024} KiB")
@pytest.mark.parametrize("d", [1, 16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("size", [2, 4])
def test_the_table_has_a_launch_for_every_width(architecture: Architecture, d: int, size: int) -> None:
    for argmax in (False, True):
        for probes in (0, 1, 128):
            launch = forward_launch(architecture, d, d, size, argmax, probes)
            assert all(block >= 16 and block & (block - 1) == 0 for block in launch[:2])
            assert forward_launches(architecture, d, d, size, argmax, probes)[0] == launch


def test_tuning_is_off_unless_the_code_or_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNLAB_AUTOTUNE", raising=False)
    assert not autotune_enabled()
    with autotune():
        assert autotune_enabled()
        with autotune(False):
            assert not autotune_enabled()
        assert autotune_enabled()
    assert not autotune_enabled()
    monkeypatch.setenv("ATTNLAB_AUTOTUNE", "1")
    assert autotune_enabled()
    with autotune(False):
        assert not autotune_enabled()


def test_a_tuned_call_gives_the_same_numbers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "_chosen", {})
    with autotune(), poisoned_memory():
        out, emitted = attention(*case.qkv, **case.options, emit=case.emit, backend="triton")
    assert_right(case, out, flat(emitted))
    assert len(tuner._chosen) == 1


def test_each_kind_of_call_is_tuned_once_and_refused_tiles_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "_chosen", {})
    choices, runs = (Launch(128, 128, 8, 2), Launch(64, 64, 4, 2)), []

    def launch(one: Launch) -> None:
        runs.append(one)
        if one == choices[0]:
            raise OutOfResources(300_000, 232_448, "shared memory")

    with autotune():
        assert tuner.fastest("kind", choices, launch, torch.zeros(1)) == choices[1]
        assert tuner.fastest("kind", choices, launch, torch.zeros(1)) == choices[1]
    assert runs == list(choices)


def test_an_untuned_call_times_nothing() -> None:
    choices = (Launch(128, 128, 8, 2), Launch(64, 64, 4, 2))
    with autotune(False):
        assert tuner.fastest("kind", choices, pytest.fail, torch.zeros(1)) == choices[0]
