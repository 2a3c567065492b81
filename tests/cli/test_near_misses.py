"""A typo gets the right near miss, in configs and in flags."""

from longspan.config.dialects.megatron import parse_megatron_flags
from longspan.config.load import make_config

KEYS = {
    "contxt_parallel_size": "context_parallel_size",
    "context_paralel_size": "context_parallel_size",
    "tensor_parallel_sise": "tensor_parallel_size",
    "tensor_paralel_size": "tensor_parallel_size",
    "dp_shard_sizes": "dp_shard_size",
    "dp_replicat_size": "dp_replicate_size",
    "micro_batchsize": "micro_batch_size",
    "micro_bath_size": "micro_batch_size",
    "gradient_acumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpoint": "gradient_checkpointing",
    "sequence_lenght": "sequence_len",
    "seqence_len": "sequence_len",
    "sample_packin": "sample_packing",
    "learning_rat": "learning_rate",
    "learing_rate": "learning_rate",
    "lr_schedular": "lr_scheduler",
    "warmup_step": "warmup_steps",
    "warmup_ration": "warmup_ratio",
    "max_step": "max_steps",
    "max_gradnorm": "max_grad_norm",
    "num_epoch": "num_epochs",
    "output_dirs": "output_dir",
    "ouput_dir": "output_dir",
    "logging_step": "logging_steps",
    "save_step": "save_steps",
    "flash_atention": "flash_attention",
    "optimiser": "optimizer",
    "basemodel": "base_model",
    "dataset": "datasets",
    "fsdp_versoin": "fsdp_version",
}
FLAGS = {
    "--tensor-model-paralel-size": "--tensor-model-parallel-size",
    "--tensor-model-parallel-sise": "--tensor-model-parallel-size",
    "--context-paralell-size": "--context-parallel-size",
    "--context-parallel-siz": "--context-parallel-size",
    "--pipline-model-parallel-size": "--pipeline-model-parallel-size",
    "--cp-com-type": "--cp-comm-type",
    "--hierachical-context-parallel-sizes": "--hierarchical-context-parallel-sizes",
    "--hybrid-context-paralel": "--hybrid-context-parallel",
    "--max-seqlen-per-dp-cp-ranks": "--max-seqlen-per-dp-cp-rank",
    "--sequence-paralel": "--sequence-parallel",
    "--num-layer": "--num-layers",
    "--hiden-size": "--hidden-size",
    "--num-attention-head": "--num-attention-heads",
    "--ffn-hiden-size": "--ffn-hidden-size",
    "--seq-lenght": "--seq-length",
    "--max-positon-embeddings": "--max-position-embeddings",
    "--micro-batchsize": "--micro-batch-size",
    "--global-bath-size": "--global-batch-size",
    "--train-iter": "--train-iters",
    "--min-lrs": "--min-lr",
    "--lr-decay-styl": "--lr-decay-style",
    "--weight-decays": "--weight-decay",
    "--clip-gradd": "--clip-grad",
    "--adam-beta3": "--adam-beta2",
    "--init-methodstd": "--init-method-std",
    "--recompute-activation": "--recompute-activations",
    "--save-intervall": "--save-interval",
    "--log-intervall": "--log-interval",
    "--tensorboard-dirs": "--tensorboard-dir",
    "--untie-embedings-and-output-weights": "--untie-embeddings-and-output-weights",
}


def test_there_are_thirty_of_each():
    assert len(KEYS) == len(FLAGS) == 30


def test_keys():
    found = {typo: make_config({typo: 1}).problems for typo in KEYS}
    assert not {
        typo: found[typo]
        for typo, right in KEYS.items()
        if f"{typo}: unknown key. Did you mean {right}?" not in found[typo]
    }


def test_flags():
    found = {typo: parse_megatron_flags([typo, "2"])[0].problems for typo in FLAGS}
    assert not {
        typo: found[typo]
        for typo, right in FLAGS.items()
        if f"{typo}: unknown option. Did you mean {right}?" not in found[typo]
    }
