"""Runs every example: `make examples`. CI does, so that they stay true.

Configs run two steps, scripts whole; one whose packages are not installed is left out, by name.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Script(NamedTuple):
    """A script, the processes torchrun starts it on (1: none are started), its options, and the packages it
    needs.

    A shell script starts its processes itself.
    """

    name: str
    processes: int = 2
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def command(self) -> list[str]:
        if self.name.endswith(".sh"):
            return ["bash", str(HERE / self.name), *self.options]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)]
        return [
            sys.executable,
            *(launcher if self.processes > 1 else []),
            str(HERE / self.name),
            *self.options,
        ]


TP2_CP2 = (
    *("--tensor-model-parallel-size", "2", "--context-parallel-size", "2"),
    "--sequence-parallel",
)
SCRIPTS = (
    Script("recall.py", processes=1),  # it makes its data and runs recall.yaml
    Script("finetune.py", processes=1),  # it makes its base model and runs finetune.yaml
    Script("from_python.py", processes=1),  # it starts its processes itself
    Script("attention_loop.py"),
    Script("gpt_loop.py", options=("--tp", "2")),
    Script("gpt_loop.py"),
    Script("vision_language.py"),
    Script(
        "megatron_scripts/launch_custom_cp_training.sh",
        options=("--train-iters", "10", "--timing-log-level", "2"),
    ),
    Script("megatron_scripts/launch_cp_demo.sh"),
    Script("megatron_scripts/verify_cp.py", processes=4, options=TP2_CP2),
    Script("megatron_scripts/check_cp_config.py", options=("--context-parallel-size", "2")),
    Script("megatron_scripts/check_cp_config.py", processes=1),
    Script("megatron_scripts/profile_cp.py", options=("--context-parallel-size", "2")),
    Script("transformers_loop.py", packages=("transformers",)),
    Script("transformers_loop.py", options=("--fsdp",), packages=("transformers",)),
    Script("transformers_trainer.py", packages=("transformers", "accelerate")),
)


def train(config: Path) -> list[str]:
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
    return [*command, "--output-dir", f"outputs/examples/{config.stem}", "--eval-max-samples", "2"]


def main() -> int:
    failed = []
    scripted = {script.name for script in SCRIPTS}
    configs = [path for path in sorted(HERE.glob("*.yaml")) if path.with_suffix(".py").name not in scripted]
    runs = [(path.name, train(path)) for path in configs]
    for script in SCRIPTS:
        missing = [package for package in script.packages if importlib.util.find_spec(package) is None]
        if missing:
            print(f"== {script.name}: left out, needs {', '.join(missing)}", flush=True)
        else:
            runs.append((" ".join((script.name, *script.options)), script.command()))
    for name, command in runs:
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=HERE.parent, env=os.environ | {"PYTHON": sys.executable}).returncode:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all examples ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
