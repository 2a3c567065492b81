"""A causal language model of transformers as a part of the trainer: the class's own layers, cut by a layout.

    input_ids [b, s] -> the class's base model -> hidden [b, s, h] -> chunks of rows, each: the class's head -> loss

s is the number of rows of the sequence that this rank holds. The base model computes attention by ``longspan``. The
logits of a chunk are made by the class's own forward, with a stand-in for its base model that returns the chunk of
hidden states. So all that the class does between head and loss (a scale, a soft cap, a bias) is done to each chunk,
and no more logits than a chunk's are ever held.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.config.model import IGNORE_INDEX
from longspan.context_parallel import SequenceLayout
from longspan.integrations.transformers import longspan_context
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.tensor_parallel.cross_entropy import CHUNK_NUMEL, CHUNK_NUMEL_CPU


class CausalLM(nn.Module):
    """transformers' class in the place of ``GPTModel``, for the trainer.

    Args:
        hf: a class of ``AutoModelForCausalLM``, made with ``attn_implementation="longspan"``.
        groups: of the run; the sequence is cut over ``groups.cp``.
        cp_comm_type, deterministic, backend: as for ``longspan_context``.

    Attributes:
        whole_logits: the class's logits are made of all rows of a rank at once, for a class whose forward does not
            work with a stand-in for its base model.
    """

    def __init__(
        self,
        hf: Any,
        groups: ProcessGroupCollection,
        *,
        cp_comm_type: str | Sequence[str] = "p2p",
        deterministic: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.hf, self.groups = hf, groups
        self.vocab_size: int = hf.config.vocab_size
        self.settings: dict[str, Any] = {
            "group": groups.cp,
            "cp_comm_type": cp_comm_type,
            "hierarchical_groups": groups.hcp or None,
            "deterministic": deterministic,
            "backend": backend,
        }
        self.whole_logits = False

    def own_parameters(self) -> list[nn.Parameter]:
        """All parameters, tied ones once."""
        return list(self.parameters())

    def plan(self, layout: SequenceLayout) -> None:
        """Nothing is computed ahead: the class's masks, and with them its windows, are made in its forward."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        layout: SequenceLayout | None = None,
        stage: None = None,
        num_targets: int | None = None,
    ) -> Tensor:
        """The loss (nats) of each of this rank's tokens, [b, s]; 0 without a target.

        Args:
            input_ids: [b, s], this rank's rows.
            position_ids: [b, s] or [1, s]; None takes the rows' positions in their documents from the layout.
            labels: [b, s], already shifted; -100 where there is no target.
            layout: which tokens each rank holds; None computes whole sequences on this rank by the class's own loss,
                a mean, and returns that ([]).
            stage: a pipeline's, which there is none of.
            num_targets: for a mean, the number of targets.
        """
        assert labels is not None
        if layout is None:
            return self._own_loss(input_ids, labels, num_targets)
        if position_ids is None:
            position_ids = layout.document_positions(dist.get_rank(self.groups.cp)).to(input_ids.device)
        position_ids = position_ids.view(-1, input_ids.shape[1]).expand(input_ids.shape[0], -1)
        with longspan_context(layout, **self.settings):
            if self.whole_logits:
                logits = self.hf(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
                return _losses(logits, labels)
            base = getattr(self.hf, self.hf.base_model_prefix)
            outputs = base(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return self._losses_in_chunks(outputs, labels)

    def _own_loss(self, input_ids: Tensor, labels: Tensor, num_targets: int | None) -> Tensor:
        """The class's mean loss of whole sequences."""
        with longspan_context(None, backend=self.settings["backend"]):
            return self.hf(
                input_ids=input_ids,
                # The empty labels only ask for a loss; the targets are shifted already.
                labels=labels[:, :0],
                shift_labels=labels,
                num_items_in_batch=torch.as_tensor(num_targets, device=labels.device),
                use_cache=False,
            ).loss

    def _losses_in_chunks(self, outputs: Any, labels: Tensor) -> Tensor:
        hidden = outputs.last_hidden_state
        batch, rows, width = hidden.shape
        hidden, labels = hidden.reshape(1, -1, width), labels.reshape(1, -1)
        numel = CHUNK_NUMEL if hidden.is_cuda else CHUNK_NUMEL_CPU
        size = max(1, numel // self.vocab_size)
        losses = []
        for chunk, targets in zip(hidden.split(size, dim=1), labels.split(size, dim=1)):
            if torch.is_grad_enabled():
                # The logits are computed once more in backward.
                loss = checkpoint(
                    self._chunk, chunk, targets, outputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                loss = self._chunk(chunk, targets, outputs)
            losses.append(loss)
        # FSDP registers hooks on the tensors that a model returns, so the loss must not be a view.
        return torch.cat(losses, dim=1).view(batch, rows).clone()

    def _chunk(self, hidden: Tensor, labels: Tensor, outputs: Any) -> Tensor:
        """The losses [1, t] of rows whose hidden states [1, t, h] are there."""
        with self._base_model_returns(hidden, outputs):
            logits = self.hf(input_ids=labels, use_cache=False).logits
        return _losses(logits, labels)

    @contextlib.contextmanager
    def _base_model_returns(self, hidden: Tensor, outputs: Any) -> Iterator[None]:
        """A context in which the class's base model returns these hidden states; it is put back at the end."""
        found = copy.copy(outputs)
        found.last_hidden_state = hidden
        modules, name = self.hf._modules, self.hf.base_model_prefix
        base, modules[name] = modules[name], _Computed(found)
        try:
            yield
        finally:
            modules[name] = base


class _Computed(nn.Module):
    """Stands in for a base model whose outputs are there."""

    def __init__(self, outputs: Any):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[b, t, v], [b, t] -> the loss of each token, [b, t], in at least float32; 0 without a target."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    return flat.view(labels.shape).clone()
