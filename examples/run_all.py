"""Runs every example for a few steps: `make examples`. CI does, so that they stay true."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    failed = []
    for config in sorted(HERE.glob("*.yaml")):
        print(f"== {config.name}", flush=True)
        command = [
            sys.executable,
            "-m",
            "longspan",
            "train",
            str(config),
            "--max-steps",
            "2",
            "--warmup-steps",
            "1",
        ]
        command += ["--output-dir", f"outputs/examples/{config.stem}", "--eval-max-samples", "2"]
        if subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(config.name)
    print("failed: " + ", ".join(failed) if failed else "all examples ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
