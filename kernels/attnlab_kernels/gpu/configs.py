"""Tile sizes and scheduling of each kernel."""

from __future__ import annotations

from typing import NamedTuple

from attnlab_kernels.gpu.architecture import Architecture, Family


class Launch(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its loads."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """What triton is told beside the tile. Later versions than 3.9 fuse a product with a sum only where told to."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


FORWARD: dict[Family, dict[int, tuple[Launch, ...]]] = {
    "ampere": {
        64: (Launch(128, 64, 8, 2), Launch(128, 64, 4, 2), Launch(64, 64, 4, 3)),
        128: (Launch(128, 64, 8, 2), Launch(128, 32, 8, 2), Launch(64, 32, 4, 2)),
        256: (Launch(64, 32, 8, 2), Launch(64, 16, 8, 2)),
    },
    "hopper": {
        64: (Launch(128, 128, 8, 2), Launch(128, 64, 8, 3), Launch(64, 64, 4, 3)),
        128: (Launch(128, 64, 8, 2), Launch(128, 128, 8, 2), Launch(64, 64, 4, 3)),
        256: (Launch(128, 32, 8, 2), Launch(64, 32, 8, 2)),
    },
    "blackwell": {
        64: (Launch(128, 64, 8, 2), Launch(128, 64, 8, 3), Launch(128, 128, 8, 2)),
        128: (Launch(128, 64, 8, 2), Launch(128, 32, 8, 2)),
        256: (Launch(128, 32, 8, 2), Launch(64, 32, 8, 2)),
    },
    "cdna": {
        64: (Launch(128, 64, 8, 1), Launch(128, 64, 4, 1)),
        128: (Launch(128, 64, 8, 1), Launch(128, 32, 8, 1)),
        256: (Launch(64, 32, 8, 1), Launch(64, 16, 4, 1)),
    },
}
"""Of half-precision forwards, by the most columns of a head: the choice first, then others that `autotune` times."""

FORWARD_WITH_PROBES = {
    64: (Launch(128, 32, 8, 2), Launch(64, 32, 8, 2)),
    128: (Launch(128, 32, 8, 2), Launch(64, 32, 8, 2)),
    256: (Launch(64, 16, 8, 2),),
}
"""The same with probe columns, whose products are in float32: fewer keys, to leave room for a second accumulator."""

FORWARD_FLOAT32: dict[Family, tuple[Launch, ...]] = {
    "ampere": (Launch(32, 32, 4, 2), Launch(32, 16, 4, 2)),
    "hopper": (Launch(32, 32, 4, 2), Launch(64, 32, 8, 2)),
    "blackwell": (Launch(32, 32, 4, 2), Launch(64, 32, 8, 2)),
    "cdna": (Launch(32, 32, 4, 1), Launch(32, 16, 4, 1)),
}
"""Of forwards in float32, whose products are not rounded, so no matrix unit takes them."""


def forward_launch(
    architecture: Architecture, d: int, dv: int, element_size: int, argmax: bool = False, probes: int = 0
) -> Launch:
    """Tile sizes whose registers and shared memory fit a forward program.

    Args:
        architecture: what it runs on.
        d: columns of a query head.
        dv: columns of a value head.
        element_size: bytes of an element.
        argmax: whether the largest entry's key is tracked, which takes registers.
        probes: probe columns, whose accumulator takes registers.
    """
    return forward_launches(architecture, d, dv, element_size, argmax, probes)[0]


def forward_launches(
    architecture: Architecture, d: int, dv: int, element_size: int, argmax: bool = False, probes: int = 0
) -> tuple[Launch, ...]:
    """The table's choice for a forward, and after it others worth timing; see `forward_launch`."""
    widest = max(d, dv)
    if element_size > 2:
        return FORWARD_FLOAT32[architecture.family]
    width = next(bound for bound in (64, 128, 256) if widest <= bound)
    chosen = FORWARD[architecture.family][width]
    if probes:
        return FORWARD_WITH_PROBES[width]
    if argmax and architecture.family == "cdna" and width > 64:
        return tuple(launch._replace(block_n=min(32, launch.block_n)) for launch in chosen)
    return chosen


def choose_parts(programs: int, key_tiles: int) -> int:
    """Over how many programs to spread the keys of a tile of queries: 1 unless a GPU would be mostly idle.

    Only shapes and tile sizes decide, so the same call sums in the same order on every device of one kind.

    Args:
        programs: tiles of queries, over all heads and batch rows.
        key_tiles: tiles of keys that each of them may visit.
    """
    if programs >= 96 or key_tiles < 8:
        return 1
    return max(1, min(256 // programs, key_tiles // 4, 64))


def rectangle_launch(n_queries: int, n_keys: int, d: int, element_size: int) -> Launch:
    """Tile sizes of a rectangle of entries, which is one product a tile.

    Args:
        n_queries: rows of the rectangle.
        n_keys: its columns.
        d: columns of a query head.
        element_size: bytes of an element.
    """
    if element_size > 2:
        most = (32, 16 if d > 64 else 32)
    else:
        most = (128, 64) if d <= 128 else (32, 32)
    fitting = (max(16, 1 << (size - 1).bit_length()) for size in (n_queries, n_keys))
    block_m, block_n = map(min, most, fitting)
    return Launch(block_m, block_n, 8 if block_m * block_n > 64 * 64 else 4, 1)


def gathered_launch(length: int) -> Launch:
    """Rows and listed keys of a tile of gathered entries; the fewest rows that a product takes, since it squares them.

    Args:
        length: listed keys of each row.
    """
    return Launch(16, min(16, 1 << (length - 1).bit_length()), 1, 1)


def top_k_launch(d: int, element_size: int, longest: int) -> Launch:
    """Tile sizes of a pass that keeps the largest entries of each row.

    Args:
        d: columns of a query head.
        element_size: bytes of an element.
        longest: entries that are kept, which share the registers with the tile.
    """
    if element_size > 2:
        return Launch(32, 16 if d > 64 else 32, 4, 1)
    if d > 128:
        return Launch(32, 32, 4, 2)
    return Launch(64 if longest <= 16 else 32, 64, 4, 2)


def gram_launch(heads: int) -> Launch:
    """Heads of a tile, and entries of a chunk, in the product of all pairs of heads.

    Args:
        heads: query heads.
    """
    return Launch(min(64, max(16, 1 << (heads - 1).bit_length())), 64, 4, 2)


def key_gradient_launch(d: int, dv: int, g: int, element_size: int, raw: bool = True, entropy: bool = False) -> Launch:
    """Tile sizes of the backward that holds keys and visits queries; its gradients of keys and values fill registers.

    Args:
        d: columns of a query head.
        dv: columns of a value head.
        g: probe columns.
        element_size: bytes of an element.
        raw: whether nothing but a scale turns products into logits.
        entropy: whether a gradient reaches the entropy.
    """
    widest = max(d, dv)
    if element_size > 2:
        return Launch(32 if widest <= 64 else 16, 32, 8, 1)
    if widest > 128:
        return Launch(32, 32, 8, 1)
    if g:
        return Launch(16, 64, 8, 2 if widest <= 64 else 1)
    if widest <= 64 or (raw and not entropy):
        return Launch(32, 128, 8, 2)
    return Launch(32 if raw or not entropy else 16, 64, 8, 2)


def query_gradient_launch(d: int, dv: int, g: int, element_size: int, entropy: bool = False) -> Launch:
    """Tile sizes of the backward that holds queries and visits keys.

    Args:
        d: columns of a query head.
        dv: columns of a value head.
        g: probe columns.
        element_size: bytes of an element.
        entropy: whether a gradient reaches the entropy.
    """
    widest = max(d, dv)
    if element_size > 2:
        return Launch(32 if widest <= 64 else 16, 32, 8, 1)
    if widest > 128:
        return Launch(32, 32, 8, 1)
    return Launch(128, 32 if g or (entropy and widest > 64) else 64, 8, 2)


def bias_gradient_launch(d: int, dv: int, element_size: int) -> Launch:
    """Tile sizes of the gradient of a bias that differs by query and by key.

    Args:
        d: columns of a query head.
        dv: columns of a value head.
        element_size: bytes of an element.
    """
    widest = max(d, dv)
    if element_size > 2:
        return Launch(32, 32, 8, 1) if widest <= 64 else Launch(16, 16, 8, 1)
    return Launch(64, 64, 4 if widest <= 64 else 8, 1)


def choose_head_parts(programs: int, group: int) -> int:
    """Over how many programs to spread the query heads of one key head: 1 unless a GPU would be mostly idle.

    Args:
        programs: tiles of keys, over all key heads and batch rows.
        group: query heads of a key head.
    """
    return 1 if programs >= 96 else max(1, min(group, 256 // max(1, programs)))


def products_launch(architecture: Architecture, d: int, dv: int, element_size: int) -> Launch:
    """Tile sizes of the passes over gradient products: `block_m` is what a program holds, of q and dO or of k and v.

    Args:
        architecture: what it runs on.
        d: columns of a query head.
        dv: columns of a value head.
        element_size: bytes of an element.
    """
    widest, cdna = max(d, dv), architecture.family == "cdna"
    if element_size > 2:
        if widest <= 64:
            return Launch(32, 32, 4, 1 if cdna else 2)
        return Launch(16, 16, 8, 1) if cdna else Launch(32 if widest <= 128 else 16, 16, 8, 2)
    if widest > 128:
        return Launch(64, 16, 4, 1)
    return Launch(64, 32, 4, 1) if cdna else Launch(128, 32, 8, 2)


def statistics_launch(
    architecture: Architecture, d: int, element_size: int, columns: int = 0, bias: bool = False
) -> Launch:
    """Tile sizes of the pass that sums over queries. A program holds the tile of keys.

    Args:
        architecture: what it runs on.
        d: columns of a query head.
        element_size: bytes of an element.
        columns: query probes of the launch, whose accumulator takes registers.
        bias: whether a bias is read entry by entry, which takes some too.
    """
    if element_size > 2:
        return Launch(16, 32, 4, 1) if columns else Launch(32, 32, 4 if d <= 64 else 8, 2)
    if architecture.family == "ampere":
        if columns:
            return Launch(32, 128, 8, 3) if d <= 64 else Launch(32, 32, 4, 2)
        return Launch(32, 128, 8, 2) if bias else Launch(64, 128, 8, 3 if d <= 128 else 2)
    narrow = columns or bias or (d > 128 and architecture.family == "blackwell")
    return Launch(32 if narrow else 64, 128, 8, 2)


def diagonals_launch(architecture: Architecture, d: int, element_size: int) -> Launch:
    """Square tiles of the pass that sums along diagonals, whose sums of single entries take registers.

    Args:
        architecture: what it runs on.
        d: columns of a query head.
        element_size: bytes of an element.
    """
    if element_size > 2:
        return Launch(32, 32, 4, 2)
    return Launch(64, 64, 4, 2)
