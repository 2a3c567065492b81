#!/bin/bash
# Starts cp_demo_minimal.py on 8 processes (TP 2 x CP 4): on 8 GPUs, or on a CPU, where it takes seconds.
set -e
cd "$(dirname "$0")"
exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node 8 cp_demo_minimal.py
