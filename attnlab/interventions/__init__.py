"""Edits of attention heads, given to `capture(model, interventions=[...])`; the order is in `capture.intervention`."""

from attnlab.interventions.identity import TowardsIdentity
from attnlab.interventions.knockout import KnockOut
from attnlab.interventions.means import mean_outputs
from attnlab.interventions.outputs import Ablate, Patch, Replace, Scale
from attnlab.interventions.sinks import RedistributeSinks
from attnlab.interventions.softmax import Streaming, Temperature
from attnlab.interventions.subspace import ProjectSubspace

__all__ = [
    "Ablate", "KnockOut", "Patch", "ProjectSubspace", "RedistributeSinks", "Replace", "Scale", "Streaming",
    "Temperature", "TowardsIdentity", "mean_outputs",
]  # fmt: skip
