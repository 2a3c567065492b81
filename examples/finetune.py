"""Makes a small base model, fine-tunes it by examples/finetune.yaml, and asks it what it was taught.

    python examples/finetune.py

The base model learns from the pages in docs for a few seconds: it stands in for a model that knows a language. The
fine-tuning then teaches it 15 instructions and 6 chats until it knows the answers by heart.
"""

import json
import subprocess
import sys
from pathlib import Path

from longspan.data.instruct import ALPACA
from longspan.runs.generate import generate, of_folder

HERE = Path(__file__).parent
BASE = {
    "datasets": "[{path: docs}]",
    "tokenizer_train_vocab_size": 1024,
    "dataset_prepared_path": "./data/finetune",
    "num_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 384,
    "sequence_len": 512,
    "val_set_size": 0,
    "max_steps": 20,
    "warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "output_dir": "./outputs/finetune-base",
    "eval_steps": "null",
    "use_tensorboard": "false",
}


def longspan(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "longspan", *arguments], check=True)


def main() -> int:
    base = [f"--{name.replace('_', '-')}={value}" for name, value in BASE.items()]
    longspan("train", str(HERE / "quickstart.yaml"), *base)
    longspan("train", str(HERE / "finetune.yaml"), *sys.argv[1:])
    right = 0
    model = of_folder("outputs/finetune/hf")
    records = [json.loads(line) for line in (HERE / "data" / "instructions.jsonl").read_text().splitlines()][
        ::5
    ]
    for record in records:
        form = ALPACA.format if record["input"] else ALPACA.no_input_format
        prompt = form.format(instruction=record["instruction"], input=record["input"])
        answer = generate(model, prompt, 32, 0.0, 0)[len(prompt) :]
        right += answer == record["output"]
        print(f"{record['instruction']} {record['input']}\n    {answer}")
    print(f"{right} of {len(records)} answers are as they were taught")
    return 0 if right >= len(records) - 1 or sys.argv[1:] else 1


if __name__ == "__main__":
    sys.exit(main())
