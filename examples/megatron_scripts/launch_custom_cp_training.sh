#!/bin/bash
# Starts custom_cp_training.py. Variables give the layout, and other flags follow the name of this file:
#
#   NPROC=4 TP=2 CP=2 bash launch_custom_cp_training.sh --train-iters 10 --timing-log-level 2
#
# On 8 GPUs, with the sizes of the notes:
#
#   NPROC=8 TP=4 CP=2 bash launch_custom_cp_training.sh --bf16 --seq-length 8192 --vocab-size 50257 \
#       --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 13696 \
#       --global-batch-size 64 --train-iters 10000 --lr 1e-4 --min-lr 1e-5
#
# The number of processes is TP x CP x DP; DP is what is left. CUDA_DEVICE_MAX_CONNECTIONS is not needed here.
set -e
NPROC=${NPROC:-4}
TP=${TP:-2}
CP=${CP:-2}
cd "$(dirname "$0")"
exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "$NPROC" custom_cp_training.py \
    --tensor-model-parallel-size "$TP" \
    --context-parallel-size "$CP" \
    --cp-comm-type p2p \
    --sequence-parallel \
    "$@"
