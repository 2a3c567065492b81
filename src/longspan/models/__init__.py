"""Model architectures. They contain no collective and no layout logic."""

from longspan.models.decoder import TransformerBlock, TransformerLayer
from longspan.models.gpt import GPTModel
from longspan.models.mixers import GatedDeltaMixer, MambaMixer
from longspan.models.vision import VisionEncoder, VisionLanguageModel

__all__ = [
    "GPTModel",
    "GatedDeltaMixer",
    "MambaMixer",
    "TransformerBlock",
    "TransformerLayer",
    "VisionEncoder",
    "VisionLanguageModel",
]
