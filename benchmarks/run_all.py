"""All benchmarks, one after another: `make bench`. Paste what matters into docs/benchmarks.md, with the machine."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = (
    ["attention.py"],
    ["attention.py", "--seq", "1024"],
    ["attention.py", "--seq", "512"],
    ["attention.py", "--packs", "20", "--pairs", "3"],
    ["layouts.py"],
    ["hybrid.py"],
    ["hybrid.py", "--ranks", "4"],
    ["hybrid.py", "--simulate"],
    ["attention.py", "--kv-heads", "2"],
    ["training.py"],
    ["training.py", "--bf16"],
    ["training.py", "--ranks", "1"],
    ["training.py", "--ranks", "1", "--bf16"],
    ["memory.py"],
    ["memory_keys.py"],
    ["memory_keys.py", "--kept"],
    ["integration.py"],
    ["lora.py"],
    ["experts.py"],
    ["recurrent.py", "--chunks", "64", "128", "256"],
    ["delta_rule.py"],
    ["recurrent_ways.py"],
    ["two_layouts.py"],
    ["two_layouts.py", "--ranks", "4"],
    ["two_layouts.py", "--whole"],
    ["pipeline.py"],
    ["checkpoint.py"],
)


def main() -> int:
    codes = []
    for run in RUNS:
        print(f"\n$ python benchmarks/{' '.join(run)}", flush=True)
        codes.append(subprocess.run([sys.executable, str(HERE / run[0]), *run[1:]]).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
