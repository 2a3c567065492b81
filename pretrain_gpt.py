"""The Megatron front door: torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 32 ... (see --help)."""

import sys

from longspan.cli.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
