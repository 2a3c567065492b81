"""Which tokens the rows of a call are, for what is balanced, counted or limited over a whole sequence.

A *sequence* is one of the data's: ``sequence_len`` tokens, packed or not. It is never a micro-batch, or a balancing
loss would depend on ``micro_batch_size``. Context parallelism (and tensor parallelism under sequence parallelism)
cuts its rows over ranks; the numbers here are those of the whole sequence.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The tokens of a micro-batch on this rank, as the data gives them; int64.

    Attributes:
        sequence, document: [b, rows], the sequence and the document of each row, from 0; -1 for padding, the layout's
            and the data's.
        place: [b, rows], the place of each row in its sequence.
        sequence_tokens, document_tokens: [P], tokens of each whole sequence and document.
        step_tokens: tokens of the global batch; None takes those of the micro-batch.
    """

    sequence: Tensor
    document: Tensor
    place: Tensor
    sequence_tokens: Tensor
    document_tokens: Tensor
    step_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of this rank that are no padding."""
        return int((self.sequence >= 0).sum())

    def with_step_tokens(self, step_tokens: int) -> Sequences:
        """The same rows of a global batch of so many tokens."""
        return dataclasses.replace(self, step_tokens=step_tokens)

    def routed(self, part: slice, device: torch.device) -> RoutedTokens:
        """For activations [part of the rows, b, h].

        Args:
            part: the rows of this tensor parallel rank.
        """
        sequence, document, place = (
            x[:, part].t().flatten().to(device) for x in (self.sequence, self.document, self.place)
        )
        tokens, of_documents = self.sequence_tokens.to(device), self.document_tokens.to(device)
        return RoutedTokens.of(sequence, document, place, tokens, of_documents, self.step_tokens)


@dataclass(frozen=True)
class TokenSet:
    """A division of the tokens of a micro-batch into P sets.

    Attributes:
        index: int64 [t], the set of each row of this rank; any number where the row is padding.
        tokens: float64 [P], tokens of each whole set without padding.
        shares: float64 [P], those divided by the tokens of the global batch.
    """

    index: Tensor
    tokens: Tensor
    shares: Tensor


@dataclass(frozen=True)
class RoutedTokens:
    """The rows [t, h] of a call.

    Attributes:
        real: bool [t]; False for padding, which is routed nowhere and counts nowhere. None where all rows are tokens.
        sequences, documents: the two divisions that balancing losses use.
        place: int64 [t], the place of each row in its sequence.
    """

    real: Tensor | None
    sequences: TokenSet
    documents: TokenSet
    place: Tensor

    @classmethod
    def of(
        cls,
        sequence: Tensor,
        document: Tensor,
        place: Tensor,
        sequence_tokens: Tensor,
        document_tokens: Tensor,
        step_tokens: int | None,
    ) -> RoutedTokens:
        """From the sequence and the document of each row [t], -1 for padding, and the tokens of each.

        Args:
            step_tokens: tokens of the global batch; None takes those of this call.
        """
        real = sequence >= 0

        def make(index: Tensor, tokens: Tensor) -> TokenSet:
            tokens = tokens.to(torch.float64)
            total = tokens.sum() if step_tokens is None else float(step_tokens)
            return TokenSet(index.clamp(min=0), tokens, tokens / max(float(total), 1.0))

        sequences, documents = make(sequence, sequence_tokens), make(document, document_tokens)
        return cls(None if bool(real.all()) else real, sequences, documents, place)

    @classmethod
    def alone(cls, rows: int, columns: int, device: torch.device) -> RoutedTokens:
        """Activations [rows, columns, h] of which nothing is known: each column is one sequence, without padding."""
        column = torch.arange(columns, device=device).repeat(rows)
        place = torch.arange(rows, device=device).repeat_interleave(columns)
        tokens = torch.full((columns,), rows, device=device)
        return cls.of(column, column, place, tokens, tokens, None)
