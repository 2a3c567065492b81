"""Trains examples/recall.yaml over 4 ranks and counts the right answers on held-out documents.

    python examples/recall.py

A document has 8 chunks of 8 tokens. Chunks 0 to 3 define 2 keys each: the token "key k has value v". Chunks 4 to 7
ask 4 times: "which value has k?", then the value. Zigzag over 4 ranks puts chunks r and 7 - r on rank r; chunk 7 - r never
asks for a key of chunk r, so no answer stands on the rank that asks for it.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from longspan.data import IndexedDatasetWriter

RANKS, CHUNK, KEYS, VALUES = 4, 8, 8, 4
ASK, VALUE, FILLER = (
    KEYS * VALUES,
    KEYS * VALUES + KEYS,
    KEYS * VALUES + KEYS + VALUES,
)  # first tokens of each kind


def document(g: np.random.Generator) -> np.ndarray:
    keys, values = g.permutation(KEYS).reshape(RANKS, -1), g.integers(VALUES, size=KEYS)
    tokens = []
    for held in keys:
        part = np.full(CHUNK, FILLER)
        part[g.choice(CHUNK, len(held), replace=False)] = held * VALUES + values[held]
        tokens.append(part)
    for chunk in range(RANKS, 2 * RANKS):
        own = 2 * RANKS - 1 - chunk  # the early chunk on the same rank
        asked = g.choice(np.delete(keys, own, axis=0).ravel(), CHUNK // 2)
        tokens.append(np.stack([ASK + asked, VALUE + values[asked]], axis=1).ravel())
    return np.concatenate(tokens)


def make_data(folder: Path, documents: int = 12864) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "recall", np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(document(g))


def answers_right(config: str) -> float:
    """The share of answers that get more than half of the probability, with the last checkpoint, on one process."""
    import torch

    from longspan.config.load import load_config
    from longspan.config.resolve import resolve
    from longspan.config.run import Run
    from longspan.mesh.mesh import close_distributed, init_distributed
    from longspan.training.checkpoint import newest
    from longspan.training.trainer import Trainer

    init_distributed("cpu")
    loaded = load_config(config, ["--context-parallel-size", "1", "--no-load-optim"])
    trainer = Trainer(Run.of(resolve(loaded, 1).config), torch.device("cpu"))
    last = newest(Path(loaded.output_dir) / "checkpoints")
    assert last is not None
    assert trainer.valid_data is not None
    trainer.resume(last)
    right = asked = 0
    with torch.no_grad():
        for batch in trainer.shard.evaluation(trainer.valid_data):
            answer = (batch.labels >= VALUE) & (batch.labels < FILLER)
            right += int((trainer.losses(batch)[answer] < np.log(2)).sum())
            asked += int(answer.sum())
    close_distributed()
    return right / asked


def main() -> int:
    config = str(Path(__file__).with_name("recall.yaml"))
    make_data(Path("data/recall"))
    subprocess.run([sys.executable, "-m", "longspan", "train", config, *sys.argv[1:]], check=True)
    share = answers_right(config)
    print(f"answers right: {100 * share:.2f} % (each stands on another rank than its question)")
    return 0 if share >= 0.99 or sys.argv[1:] else 1


if __name__ == "__main__":
    sys.exit(main())
