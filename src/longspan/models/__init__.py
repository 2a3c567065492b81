"""Model architectures. They contain no collective and no layout logic."""

from longspan.models.decoder import TransformerBlock, TransformerLayer
from longspan.models.gpt import GPTModel
from longspan.models.vision import VisionEncoder, VisionLanguageModel

__all__ = ["GPTModel", "TransformerBlock", "TransformerLayer", "VisionEncoder", "VisionLanguageModel"]
