"""What each head adds to a prediction: direct logit attribution, activation patching, attribution patching."""

from attnlab.attribution.direct import direct_logit_attribution
from attnlab.attribution.gradients import attribution_patching
from attnlab.attribution.metric import Metric, Rows, logit_difference
from attnlab.attribution.patching import activation_patching

__all__ = [
    "Metric", "Rows", "activation_patching", "attribution_patching", "direct_logit_attribution", "logit_difference",
]  # fmt: skip
