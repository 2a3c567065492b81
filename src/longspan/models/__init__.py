"""Model architectures. They contain no collective and no layout logic."""

from longspan.models.decoder import TransformerBlock, TransformerLayer
from longspan.models.gpt import GPTModel

__all__ = ["GPTModel", "TransformerBlock", "TransformerLayer"]
