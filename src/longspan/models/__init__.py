"""Model architectures. They contain no collective and no layout logic."""

from longspan.models.gpt import GPTModel, TransformerBlock, TransformerLayer

__all__ = ["GPTModel", "TransformerBlock", "TransformerLayer"]
