"""Which kind of chip a launch is for, as far as tile sizes depend on it. Asked at a launch, never at import."""

from __future__ import annotations

from typing import Literal, NamedTuple

import triton
from torch import Tensor

Family = Literal["ampere", "hopper", "blackwell", "cdna"]
KIB = 1024


class Architecture(NamedTuple):
    """A family of chips with the same matrix units, and the bytes of shared memory that a program may take."""

    family: Family
    shared: int


AMPERE = Architecture("ampere", 163 * KIB)
ADA = Architecture("ampere", 99 * KIB)
"""Consumer cards: Ampere's matrix instructions and less shared memory; consumer Blackwell is one of them."""
HOPPER = Architecture("hopper", 227 * KIB)
BLACKWELL = Architecture("blackwell", 227 * KIB)
CDNA = Architecture("cdna", 64 * KIB)

ARCHITECTURES = (AMPERE, ADA, HOPPER, BLACKWELL, CDNA)


def architecture_of(tensor: Tensor) -> Architecture:
    """What runs kernels on this tensor. In the interpreter, whose tensors are the CPU's, Hopper's tiles are taken."""
    if tensor.device.type == "cpu":
        return HOPPER
    target = triton.runtime.driver.active.get_current_target()
    return architecture_named(target.backend, target.arch)


def architecture_named(backend: str, arch: int | str) -> Architecture:
    """An architecture by triton's name for it: ("cuda", 90), ("hip", "gfx942").

    Example:
        >>> architecture_named("cuda", 89).shared // 1024
        99
    """
    if backend == "hip":
        return CDNA
    major, minor = divmod(int(arch), 10)
    if major == 9:
        return HOPPER
    if major in (10, 11):
        return BLACKWELL
    if major == 8 and minor in (0, 7):
        return AMPERE
    return ADA
