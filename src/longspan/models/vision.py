"""A vision-language model: an encoder of images, a projector, and a language model over both.

    images [n, c, H, W] -> patches -> encoder [p, n, h'] -> projector -> image embeddings [n x p, h]
    input_ids [b, s], image embeddings -> joined rows [s, b, h] -> language model -> logits, or loss [b, s]

n is the number of images, c their channels, p the number of patches of an image (``img_seq_len``), h' and h
the hidden sizes of encoder and language model, s the number of rows of the joined sequence that this rank
holds.

The encoder is not cut over context parallel ranks: every rank computes all images whole
(``local_cp_size=1``), and each patch attends to all patches of its image. The joined sequence is cut. A rank
embeds its own text tokens and takes the image embeddings that stand in its own rows, so no embedding is sent.
Its gradient of the encoder is that of its own rows; the sum over the context parallel ranks, which all
parameters need, completes it.

Over tensor parallel ranks the image embeddings are whole, so the encoder has no sequence parallelism. The
language model may have it: each tensor parallel rank then takes its share of the joined rows, and in backward
the shares are gathered, so that every rank computes the whole gradient of the encoder.

Not here: mRoPE (positions of several axes), images of different sizes, and a pipeline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from longspan.config.model import IGNORE_INDEX, AttnMaskType, TransformerConfig
from longspan.context_parallel import PackedSeqParams, SequenceLayout
from longspan.context_parallel.attention import place_in_call
from longspan.context_parallel.multimodal import get_image_index
from longspan.mesh.default_groups import process_groups
from longspan.mesh.mesh import ProcessGroupCollection
from longspan.models.decoder import TransformerBlock
from longspan.models.gpt import GPTModel
from longspan.tensor_parallel.initial import filled_by_name
from longspan.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallelModule,
    local,
)
from longspan.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from longspan.tensor_parallel.mlp import activation_of, mlp_product
from longspan.tensor_parallel.random import Constant, Normal

Size = int | tuple[int, int]


def patches(images: Tensor, patch_size: int) -> Tensor:
    """[n, c, H, W] -> [p, n, c x patch_size^2]: square patches, row after row."""
    n, c, height, width = images.shape
    cells = images.reshape(n, c, height // patch_size, patch_size, width // patch_size, patch_size)
    # [n, c, rows, y, columns, x] -> [rows, columns, n, c, y, x]
    return cells.permute(2, 4, 0, 1, 3, 5).reshape(-1, n, c * patch_size**2)


class PatchEmbedding(TensorParallelModule):
    """images [n, c, H, W] -> [p, n, h]: a linear layer on each patch, and the learned position of each patch.

    The weights are copied on all tensor parallel ranks, which all compute the same here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_patches: int,
        patch_size: int,
        channels: int,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config, pg_collection.tp_mesh)
        self.patch_size, h, initial = patch_size, config.hidden_size, Normal(config.init_method_std)
        self.weight = self._parameter("weight", (h, channels * patch_size**2), None, initial)
        self.bias = self._parameter("bias", (h,), None, Constant(0.0))
        self.positions = None
        if config.position_embedding_type == "learned_absolute":
            self.positions = self._parameter("positions", (num_patches, h), None, initial)

    def forward(self, images: Tensor) -> Tensor:
        weight = local(self.weight)
        x = patches(images.to(weight.dtype), self.patch_size) @ weight.t() + local(self.bias)
        return x if self.positions is None else x + local(self.positions).unsqueeze(1)


class VisionEncoder(nn.Module):
    """images [n, c, H, W] -> [p, n, h]: full attention inside each image, whole on every rank.

    Args:
        config: the encoder's own config: its position_embedding_type is ``learned_absolute`` or ``none``, and
            it has no sequence parallelism, no experts and no pipeline.
        image_size: height and width in pixels, or one number for both.
        patch_size: pixels of the side of a square patch; it divides height and width.
        channels: values of a pixel.
        pg_collection, seed: as for :class:`GPTModel`.

    Attributes:
        img_seq_len: number of patches, and so of embeddings, of an image.

    Raises:
        ValueError: the config is not supported, or the patch does not fit the image.
    """

    def __init__(
        self,
        config: TransformerConfig,
        image_size: Size,
        patch_size: int,
        channels: int = 3,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        seed: int | None = None,
    ):
        super().__init__()
        groups = process_groups(pg_collection)
        _check_encoder(config)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if patch_size < 1 or min(height, width) < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size {patch_size} does not divide an image of {height} x {width} pixels: patches cover the image without "
                "a rest. Choose a divisor of both, or resize the images."
            )
        self.config, self.image_shape = config, (channels, height, width)
        self.img_seq_len = (height // patch_size) * (width // patch_size)
        with filled_by_name(self, config, groups.tp.size(), seed, "vision_model"):
            self.patch_embedding = PatchEmbedding(config, self.img_seq_len, patch_size, channels, groups)
            self.encoder = TransformerBlock(
                config,
                pg_collection=groups,
                numbers=range(1, config.num_layers + 1),
                attn_mask_type=AttnMaskType.no_mask,
            )

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, H, W], floating point numbers that the caller has normalised -> [p, n, h]

        Raises:
            ValueError: the images have another size, or are integers.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape or not len(images):
            c, height, width = self.image_shape
            raise ValueError(
                f"images have shape {tuple(images.shape)}: it is [images, {c}, {height}, {width}] (channels, height, width), "
                "with at least one image. Resize the images, or make the encoder for their size."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}: they are floating point numbers. Divide pixels of 0 .. 255 by 255, and normalise them."
            )
        whole = PackedSeqParams(local_cp_size=1)
        return self.encoder(self.patch_embedding(images), packed_seq_params=whole)[0]


def _check_encoder(config: TransformerConfig) -> None:
    layers = "layer_types" if config.layer_types is not None else "hybrid_override_pattern"
    for name, wrong, remedy in (
        (
            layers,
            config.recurrent,
            "a recurrent layer shows a patch those before it alone, and patches attend to all. Leave it out",
        ),
        (
            "position_embedding_type",
            config.position_embedding_type == "rope",
            "rotary positions of images are not supported yet. Use learned_absolute, or none",
        ),
        (
            "sequence_parallel",
            config.sequence_parallel,
            "image embeddings are whole on every tensor parallel rank. Leave it False; the language model may have it",
        ),
        (
            "num_moe_experts",
            config.num_moe_experts is not None,
            "experts are not supported here. Leave it out",
        ),
        (
            "pipeline_model_parallel_size",
            config.pipeline_model_parallel_size > 1,
            "the encoder is on one rank. Use 1",
        ),
    ):
        if wrong:
            raise ValueError(f"{name}={getattr(config, name)!r} of the vision encoder: {remedy}.")


class VisionProjector(nn.Module):
    """[.., h'] -> [.., h]: an MLP from the encoder's to the language model's hidden size.

    Args:
        config: the encoder's config; its ffn_hidden_size and activation_func are those of the hidden layer.
        output_size: the language model's hidden size.
    """

    def __init__(self, config: TransformerConfig, output_size: int, pg_collection: ProcessGroupCollection):
        super().__init__()
        ffn, tp = config.ffn_hidden_size, pg_collection.tp_mesh
        self.activation = activation_of(config.activation_func)
        self.linear_up = ColumnParallelLinear(config.hidden_size, ffn, config, tp_group=tp)
        self.linear_down = RowParallelLinear(ffn, output_size, config, tp_group=tp)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.linear_up.operands(), self.linear_down.operands()
        return self.linear_down.leave(mlp_product(self.linear_up.enter(x), None, up, down, self.activation))


class VisionLanguageModel(nn.Module):
    """A language model that sees images: their embeddings stand in the places of placeholder tokens.

    Args:
        language_config: config of the language model, a :class:`GPTModel` with rotary positions or none.
        vision_config: config of the encoder and of the projector, see :class:`VisionEncoder`.
        vocab_size, max_sequence_length: as for GPTModel; a sequence consists of text and image tokens.
        image_size, patch_size, channels: as for :class:`VisionEncoder`.
        image_token_id: the placeholder of an image embedding in ``input_ids``: a number that no text token
            has, inside the vocabulary or not (Megatron-LM's is -200).
        parallel_output, pg_collection, seed: as for GPTModel. Weights depend on their names in this model.

    Attributes:
        img_seq_len: number of image tokens of an image.

    Raises:
        ValueError: a config is not supported.

    As for GPTModel, call ``longspan.finalize_model_grads(model)`` after backward (or use FSDP2, summing).
    """

    def __init__(
        self,
        language_config: TransformerConfig,
        vision_config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        image_size: Size,
        patch_size: int,
        image_token_id: int,
        channels: int = 3,
        parallel_output: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        seed: int | None = None,
    ):
        super().__init__()
        self.groups = groups = process_groups(pg_collection)
        self.config, self.image_token_id = language_config, image_token_id
        if language_config.position_embedding_type == "learned_absolute":
            raise ValueError(
                "position_embedding_type='learned_absolute' of the language model: image rows would have no position. Use rope."
            )
        if image_token_id == IGNORE_INDEX:
            raise ValueError(
                f"image_token_id={image_token_id}: a label of this number means that there is no target. Use another number."
            )
        if language_config.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"pipeline_model_parallel_size={language_config.pipeline_model_parallel_size}: a vision-language model over a "
                "pipeline is not supported yet. Use 1."
            )
        with filled_by_name(self, language_config, groups.tp.size(), seed):
            self.vision_model = VisionEncoder(vision_config, image_size, patch_size, channels, groups)
            self.vision_projection = VisionProjector(vision_config, language_config.hidden_size, groups)
            self.language_model = GPTModel(
                language_config,
                vocab_size,
                max_sequence_length,
                parallel_output=parallel_output,
                pg_collection=groups,
            )
        self.img_seq_len = self.vision_model.img_seq_len

    def forward(
        self,
        images: Tensor | None,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        layout: SequenceLayout | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with labels the loss of each token, as of GPTModel.

        Args:
            images: [n, c, H, W], all images of the whole sequences, the same on every context parallel rank;
                None for text alone. Under FSDP2 the encoder then computes one blank image.
            input_ids: [b, s], this rank's rows of the joined sequences, placeholders included.
            labels: [b, s], this rank's rows, already shifted; -100 where the target is an image token.
            image_index: [b, s], this rank's rows of ``context_parallel.get_image_index``. None computes it
                from ``input_ids``, which is possible only if this rank has whole sequences.
            position_ids, attention_mask, loss_mask, packed_seq_params, layout: as for GPTModel.

        Raises:
            ValueError: as for GPTModel, or images, placeholders, ``image_index`` and labels do not fit each
                other. Values on a GPU are not compared, because reading them would wait for the GPU.
        """
        count = 0 if images is None else len(images)
        if image_index is None:
            image_index = self._image_index(input_ids, count, packed_seq_params)
        self._check(input_ids, image_index, labels, count * self.img_seq_len)
        placeholder, embedding = image_index >= 0, self.language_model.embedding
        assert embedding is not None
        # The embedding of an id in the place of an image is replaced, so any id of the vocabulary does.
        hidden = embedding(input_ids.masked_fill(placeholder, 0))
        if images is not None and count:
            hidden = self._joined(hidden, self.embed_images(images), image_index)
        elif any(isinstance(part, FSDPModule) for part in self.vision_model.modules()):
            # Ranks with images gather the encoder's weights from this one too. No row takes this image.
            blank = torch.zeros(1, *self.vision_model.image_shape, dtype=hidden.dtype, device=hidden.device)
            hidden = self._joined(hidden, self.embed_images(blank), image_index)
        return self.language_model(
            None,
            position_ids,
            attention_mask,
            labels,
            loss_mask,
            packed_seq_params,
            layout,
            decoder_input=hidden,
        )

    def embed_images(self, images: Tensor) -> Tensor:
        """[n, c, H, W] -> [n x p, h], the embeddings of one image after another."""
        return self.vision_projection(self.vision_model(images)).transpose(0, 1).flatten(0, 1)

    def _joined(self, text: Tensor, embeddings: Tensor, image_index: Tensor) -> Tensor:
        """Embedded text [s, b, h] (or [s/tp, b, h]) -> the same with the image embeddings in their rows."""
        index = image_index.t()
        rows = embeddings.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, -1)
        if self.config.sequence_parallel:
            rows = scatter_to_sequence_parallel_region(rows, self.groups.tp)
            held = text.shape[0]
            index = index[self.groups.tp.rank() * held :][:held]
        return torch.where((index >= 0).unsqueeze(-1), rows.to(text.dtype), text)

    def _image_index(self, input_ids: Tensor, images: int, params: PackedSeqParams | None) -> Tensor:
        _, ranks = place_in_call(self.groups.cp, params)
        if ranks > 1:
            raise ValueError(
                f"image_index is missing, and the sequences are cut over {ranks} context parallel ranks: image tokens can only be "
                "counted before the cut. Give this rank's rows of get_image_index(tokens, ...), cut as the tokens were cut."
            )
        return get_image_index(input_ids, self.image_token_id, images, self.img_seq_len)

    def _check(self, input_ids: Tensor, image_index: Tensor, labels: Tensor | None, embeddings: int) -> None:
        """Refuses rows that do not fit each other."""
        if image_index.shape != input_ids.shape:
            raise ValueError(
                f"image_index has shape {tuple(image_index.shape)} beside input_ids of {tuple(input_ids.shape)}: it is cut "
                "as the tokens were cut (get_batch_on_this_cp_rank, or layout.shard with pad_value=-1)."
            )
        if input_ids.device.type != "cpu":
            return
        if not torch.equal(input_ids == self.image_token_id, image_index >= 0):
            raise ValueError(
                f"image_index does not fit input_ids: it is -1 where a token is text, and a number of an embedding where it is the "
                f"image token {self.image_token_id}. Make it from the whole tokens (get_image_index), and cut both by the same "
                "layout, image_index with pad_value=-1."
            )
        if image_index.numel() and int(image_index.max()) >= embeddings:
            raise ValueError(
                f"image_index holds {int(image_index.max())}, but the images have {embeddings} embeddings, from 0. Give all images "
                "of the whole sequences to every context parallel rank."
            )
        if labels is not None and (labels == self.image_token_id).any():
            raise ValueError(
                f"labels hold the image token {self.image_token_id}: an image token is never predicted. Its label is -100 "
                "(get_shifted_labels)."
            )
