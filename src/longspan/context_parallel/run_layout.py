"""The layout of a run's packs, for training, evaluation, the banner and ``longspan layout``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.config.run import Checked
from longspan.context_parallel.layout import SequenceLayout


def run_layout(
    run: Checked, total: int, cu_seqlens: Sequence[int] | Any = None, name: str | None = None
) -> SequenceLayout:
    """The layout of ``total`` tokens over the context parallel ranks of a run.

    Args:
        cu_seqlens: boundaries of the documents, integers from 0 to total; None means one document.
        name: ``auto`` or one of ``LAYOUTS``; None takes the run's ``cp_layout``. A model with recurrent layers has
            one layout for all tokens of its stream, ``contiguous``.
    """
    if run.model.recurrent:
        name = "contiguous"
    return SequenceLayout.make(
        name or run.config.cp_layout,
        total,
        run.sizes.cp,
        cu_seqlens=cu_seqlens,
        windows=run.windows,
        multiple_of=run.row_multiple,
        # Ranks that exchange heads in every layer get chunks together.
        together=min(map(run.head_group, run.attention_layers), default=1),
    )
