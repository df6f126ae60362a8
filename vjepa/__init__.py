"""The model and how it learns: encoder, predictor, masking, objectives, trainer, hub."""

from vjepa import hub
from vjepa.hub import from_pretrained
from vjepa.registry import create_model, list_models

__all__ = ["create_model", "from_pretrained", "hub", "list_models"]
