"""Where a SortingShape comes from: a known model, a Hugging Face id or config, or numbers."""

from adaptive_moe.models.config import model_from_config
from adaptive_moe.models.known import find_model, hub_config, known_models, title_of
from adaptive_moe.models.model import FUSED, Model, ModelError

__all__ = [
    "FUSED",
    "Model",
    "ModelError",
    "find_model",
    "hub_config",
    "known_models",
    "model_from_config",
    "title_of",
]
