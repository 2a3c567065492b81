"""transformers' Trainer, its sequences cut over the processes (needs `pip install accelerate`).

    python -m torch.distributed.run --nproc-per-node 2 examples/transformers_trainer.py

Two things differ from a Trainer that cuts batches: every process reads the whole batch, and the loss is this rank's share.
"""

import tempfile

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from longspan.integrations.transformers import longspan_context, shard_batch


class LongspanTrainer(Trainer):
    def get_train_dataloader(
        self,
    ):  # as it is, not prepared by accelerate: that would deal rows out to the ranks
        order = torch.Generator().manual_seed(self.args.data_seed or self.args.seed)
        size = self.args.per_device_train_batch_size
        return DataLoader(
            self.train_dataset, size, shuffle=True, generator=order, collate_fn=self.data_collator
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        group = dist.group.WORLD
        config = self.accelerator.unwrap_model(model).config
        shard = shard_batch(inputs, group=group, config=config, num_items_in_batch=num_items_in_batch)
        with longspan_context(shard.layout, group=group):
            outputs = model(**shard.inputs)
        loss = (
            outputs.loss * dist.get_world_size()
        )  # DDP, FSDP and the log average over ranks: shares are to be summed
        return (loss, outputs) if return_outputs else loss


torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     intermediate_size=128)  # fmt: skip
counting = [(start + torch.arange(500) * (1 + start % 3)) % 256 for start in range(32)]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=True,
        average_tokens_across_devices=False,  # every rank counts the whole batch already
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="longspan")
    data = [{"input_ids": tokens, "labels": tokens} for tokens in counting]
    LongspanTrainer(model, arguments, train_dataset=data).train()
if dist.is_initialized():
    dist.destroy_process_group()
