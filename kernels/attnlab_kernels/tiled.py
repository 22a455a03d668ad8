"""Backend `tiled`: plain torch over blocks of queries, memory that grows as N, every option and every statistic."""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.emit import Emitted
from attnlab_kernels.hidden import without_idle_masks
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request
from attnlab_kernels.statistics import Collector
from attnlab_kernels.strips import prepared, run_strips
from attnlab_kernels.tiles import CACHE_SCORES, SPENT_ROWS, SPENT_TIMES, Tile, plan_strips, without_gap
from attnlab_kernels.workspace import Workspace


def tiled_attention(problem: Problem, request: Request, scores: int = CACHE_SCORES) -> tuple[Tensor, Emitted]:
    """Output [B, Hq, Nq, Dv] in q's dtype and the statistics in float32, or in float64 from float64 inputs.

    No gradients are recorded; `tiled_gradients` computes them.

    Args:
        problem: what to compute.
        request: the statistics asked for.
        scores: how many entries of the pattern may exist at one time.
    """
    problem = prepared(problem)
    collector = Collector(problem, request)

    def run(strip: list[Tile], work: Workspace) -> None:
        work.begin()
        for tile in strip:
            parts = without_gap(problem, tile)
            blocks = [without_idle_masks(problem.cut(*part)) for part in parts]
            collector.add(parts, blocks, work)

    if collector.keeps:
        strips = plan_strips(problem, request.emit.head_gram, scores, gaps=True)
    else:
        strips = plan_strips(problem, False, SPENT_TIMES * scores, True, SPENT_ROWS)
    run_strips(run, strips, problem)
    return collector.finish()
