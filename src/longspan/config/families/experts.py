"""What model types with experts have in common, beside what their dense relatives have.

    ours                                                   theirs (Qwen; Mixtral has other words)
    decoder.layers.I.mlp.router.weight           [E, h]    model.layers.I.mlp.gate.weight
    decoder.layers.I.mlp.experts.gate_weight  [E, f, h]    model.layers.I.mlp.experts.J.gate_proj.weight  [f, h], J = 0 .. E-1
    decoder.layers.I.mlp.shared_experts.linear_gate        model.layers.I.mlp.shared_expert.gate_proj
    decoder.layers.I.mlp.shared_experts.gate               model.layers.I.mlp.shared_expert_gate

Hugging Face's balancing loss pools the routers of all layers and adds up to k where the load is even; longspan's is c for
each layer. So ``router_aux_loss_coef`` c' is c = c' k / (layers with experts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from longspan.config.architecture import Architecture
from longspan.config.families.family import Family, Place

#: our tensor of experts -> the name of their linear layer
_PARTS = {"gate_weight": "gate_proj", "up_weight": "up_proj", "down_weight": "down_proj"}


class WithExperts(Family):
    """To be mixed in before a dense family.

    Attributes:
        count: the field with the number of experts.
        prefix: of an expert's tensors, after the layer's.
        matrices: our tensor of experts -> theirs.
    """

    count: ClassVar[str] = "num_experts"
    prefix: ClassVar[str] = "mlp.experts"
    matrices: ClassVar[Mapping[str, str]] = _PARTS
    sparse: ClassVar[tuple[bool, ...]] = (True,)
    required: ClassVar[tuple[str, ...]] = (
        "num_experts_per_tok",
        "decoder_sparse_step",
        "moe_intermediate_size",
        "num_experts",
        "num_local_experts",
    )
    expert_needs: ClassVar[dict[str, Any]] = {
        "moe_router_score_function": "softmax",
        "moe_router_num_groups": None,
        "moe_router_topk_scaling_factor": None,
        "moe_expert_capacity_factor": None,
    }

    def read_experts(self, data: Mapping[str, Any], layers: list[int]) -> dict[str, Any]:
        """Keys of the router; ``layers`` are the indices of those with experts."""
        topk = data["num_experts_per_tok"]
        return {
            # transformers 5 has saved some types with the name of the other.
            "num_moe_experts": data.get("num_local_experts") or data[self.count],
            "moe_router_topk": topk,
            "moe_aux_loss_coeff": (data.get("router_aux_loss_coef") or 0.0) * topk / max(1, len(layers)),
        }

    def expert_fields(self, model: Architecture) -> dict[str, Any]:
        """Fields of the router in a config.json."""
        layers = len(model.expert_layers)
        coefficient = sum(model.balancing.values()) * layers / model.moe_router_topk
        return {
            self.count: model.num_moe_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "router_aux_loss_coef": coefficient,
        }

    def places(self, name: str, model: Architecture) -> list[Place]:
        module, _, part = name.rpartition(".")
        if not module.endswith("mlp.experts"):
            return super().places(name, model)
        index = module.split(".")[2]
        assert model.num_moe_experts is not None
        stem = f"{self.layers}.{index}.{self.prefix}"
        return [Place(f"{stem}.{j}.{self.matrices[part]}.weight", j) for j in range(model.num_moe_experts)]


def layer_pattern(indices: set[int], layers: int) -> int | list[int]:
    """The indices of layers with experts -> ``moe_layer_freq``."""
    return 1 if len(indices) == layers else [int(i in indices) for i in range(layers)]
