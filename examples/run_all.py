"""Runs every example for a few steps: `make examples`. CI does, so that they stay true.

Python examples run on two processes; one whose packages are not installed is left out, by name.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: example -> options, and the packages it needs beside longspan
SCRIPTS = (
    ("attention_loop.py", (), ()),
    ("transformers_loop.py", (), ("transformers",)),
    ("transformers_loop.py", ("--fsdp",), ("transformers",)),
    ("transformers_trainer.py", (), ("transformers", "accelerate")),
)


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
    for name, options, packages in SCRIPTS:
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        print(
            f"== {' '.join((name, *options))}" + (f": left out, needs {', '.join(missing)}" * bool(missing)),
            flush=True,
        )
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            str(HERE / name),
            *options,
        ]
        if not missing and subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all examples ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
