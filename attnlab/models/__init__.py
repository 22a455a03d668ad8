"""Loading models and running them without more than an analysis needs."""

from attnlab.models.load import load_model
from attnlab.models.model import Model
from attnlab.models.shipped import shipped_models, shipped_path

__all__ = ["Model", "load_model", "shipped_models", "shipped_path"]
