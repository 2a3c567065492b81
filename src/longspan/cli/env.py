"""``longspan env``: prints versions, devices and variables; ``--check`` tries the machines."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.cli.launch import OPTIONS as LAUNCH_OPTIONS
from longspan.cli.launch import read_launch, split_at_dashes
from longspan.cli.options import number, read_config, take_options
from longspan.config.resolve import resolve
from longspan.config.run import Checked
from longspan.errors import UserError, did_you_mean
from longspan.runs.environment import VARIABLES, found
from longspan.runs.start import WORKER, Launch, ProcessesFailed, under_torchrun

if TYPE_CHECKING:
    from longspan.runs.machine.protocol import Finding

#: options that need --check
CHECK_OPTIONS = {"--device": True, "--timeout": True, WORKER: True, **LAUNCH_OPTIONS}
OPTIONS = {"--json": False, "--check": False, **CHECK_OPTIONS}
#: the inputs for which the attention backend is shown without a config
USUAL_DTYPE, USUAL_HEAD = "bfloat16", 128
DEVICES = ("auto", "cpu", "cuda")
PACKAGES = (
    "longspan",
    "torch",
    "numpy",
    "pydantic",
    "tokenizers",
    "safetensors",
    "transformers",
    "flash-attn",
    "flash-attn-3",
)
CHECK_HELP = """\
--check starts processes, and prints in under five minutes what is broken, wrong or slow on these machines. It
compares every exchange with its known result, attention kernels and grouped experts with plain mathematics,
two steps of a tiny model with one process, and links and ranks with each other.
Exit code 1 if something is broken or wrong.
  --device D             auto, cpu or cuda (default auto)
  --timeout S            seconds that an exchange waits for an answer (default 20)
  --num-processes N      processes over all machines (default: all GPUs; on CPU two a machine)
  --num-machines M, --machine-rank R, --main-process-ip IP, --main-process-port P
                         several machines: run the same command on each, with its own rank
  --launcher torchrun    pass what follows -- to torchrun
"""
#: the status of a finding -> how it is printed; what fails is in capitals
WORDS = {"wrong": "WRONG", "broken": "BROKEN"}


def usage() -> str:
    lines = [
        "usage: longspan env [CONFIG [--any-key value] [--num-processes N]] [--json]",
        "       longspan env --check [--json] [--device D] [--timeout S] [launcher options]",
        "",
        "Prints versions, devices, the links between GPUs, which attention backend is chosen and why, and with a",
        "config, whether its context parallel groups would exchange over slow links. Also which of these",
        "environment variables are set and what each does here:",
    ]
    width = max(map(len, VARIABLES))
    return "\n".join(
        [*lines, *(f"  {n:<{width}}  {v.handling}: {v.text}" for n, v in VARIABLES.items()), "", CHECK_HELP]
    )


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(usage())
        return 0
    given, torchrun_arguments = split_at_dashes(arguments)
    taken, rest, problems = take_options(given, OPTIONS)
    with_config = bool(rest) and "--check" not in taken and not rest[0].startswith("-")
    if not with_config:
        problems += [f"{a!r}: longspan env takes no such option.{did_you_mean(a, OPTIONS)}" for a in rest]
    if "--check" in taken:
        return check(taken, torchrun_arguments, problems)
    allowed = {"--num-processes"} if with_config else set()
    problems += [
        f"{option} is for longspan env --check."
        for option in taken
        if option in CHECK_OPTIONS.keys() - allowed
    ]
    run = read_run(rest, number(taken, "--num-processes", problems), problems) if with_config else None
    if problems:
        raise UserError(problems)
    show("--json" in taken, run)
    return 0


def read_run(rest: list[str], world: int | None, problems: list[str]) -> Checked:
    """The run of ``CONFIG [--any-key value]``; its datasets may be missing.

    Raises:
        UserError: with all problems at once.
    """
    reading = read_config("env", rest, list(OPTIONS), problems)
    assert reading.config is not None
    return resolve(reading.config, world, bad_keys=reading.bad | {"datasets"}, earlier=reading.problems)


def show(as_json: bool, run: Checked | None) -> None:
    """Prints everything; ``run`` is checked against the links."""
    rows, variables = versions_and_devices(), found(os.environ)
    rows |= attention_and_links(run)
    if as_json:
        print(json.dumps({**rows, "environment": variables}, indent=2))
        return
    for name, value in rows.items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{f'gpu {i}' if name == 'gpus' else name:<14} {line}")
    if variables:
        print("\nenvironment")
        for v in variables:
            print(f"  {v['name']}={v['value']}\n      {v['handling']}: {v['text']}")


def versions_and_devices() -> dict:
    import torch

    rows: dict = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["cores"] = os.cpu_count()
    rows["cuda"] = torch.version.cuda or "none"
    rows["nccl"] = "none"
    if torch.version.cuda and torch.distributed.is_nccl_available():
        rows["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    rows["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return rows


def attention_and_links(run: Checked | None) -> dict:
    """attention: which backend is chosen and why; links: a line each; slow links: what is slow, with the remedy."""
    import torch

    from longspan.context_parallel.kernels.choose import select_kernel
    from longspan.runs.machine.links import (
        context_parallel_groups,
        read_links,
        remedy,
        slow_groups,
        visible_gpus,
    )

    dtype, head, backend, deterministic = USUAL_DTYPE, USUAL_HEAD, "auto", False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if run is not None:
        dtype, head = run.precision.compute_dtype, run.model.kv_channels
        backend, deterministic = run.config.attention_backend, run.config.deterministic_mode
        device = device if run.config.device == "auto" else run.config.device
    chosen = select_kernel(torch.device(device), getattr(torch, dtype), head, backend, deterministic)
    rows: dict = {
        "attention": f"{chosen.kernel.name} for {dtype}, head size {head} on {device}: {chosen.reason}"
    }
    links, why_not = read_links()
    rows["links"] = links.lines() if links is not None else [f"not known: {why_not}"]
    if run is None or run.sizes.cp == 1:
        return rows
    if links is None:
        rows["slow_links"] = [f"not checked, because the links are not known ({run.sizes.equation()})"]
        return rows
    gpus = visible_gpus(links, os.environ.get("CUDA_VISIBLE_DEVICES"))
    slow = slow_groups(context_parallel_groups(run), links, gpus)
    rows["slow_links"] = ["none in context parallel groups"]
    if slow:
        rows["slow_links"] = [*(f"WARNING: {text}" for text in slow), remedy(run, len(gpus))]
    return rows


# --- --check ----------------------------------------------------------------------------------


def check(taken: dict[str, str], torchrun_arguments: list[str], problems: list[str]) -> int:
    """Checks the machines. Returns exit code 0 if nothing is broken or wrong, otherwise 1.

    Raises:
        UserError: options that do not fit.
    """
    from longspan.runs.machine.check import EXCHANGE_S, check_machines, device_and_processes, work

    launch = read_launch(taken, torchrun_arguments, problems)
    seconds, device, as_json = (
        number(taken, "--timeout", problems),
        taken.get("--device", "auto"),
        "--json" in taken,
    )
    if device not in DEVICES:
        problems.append(f"--device {device!r}: one of {', '.join(DEVICES)}.{did_you_mean(device, DEVICES)}")
    if under_torchrun() and WORKER not in taken:
        problems.append("longspan env --check starts its processes itself: run it without torchrun.")
    if problems:
        raise UserError(problems)
    # The report alone goes to stdout as JSON; then its lines go to stderr.
    lines = Lines(sys.stderr if as_json else sys.stdout)
    if WORKER in taken:
        work(Path(taken[WORKER]), device, float(seconds or EXCHANGE_S), lines.began, lines.found)
    device, processes = device_and_processes(launch, device)
    lines.print(header(launch, device, processes))
    options = [*(["--timeout", str(seconds)] if seconds else []), *(["--json"] if as_json else [])]
    try:
        report = check_machines(launch, device, processes, options)
    except ProcessesFailed as error:
        return error.code
    if as_json:
        from longspan.training.metrics import finite

        print(json.dumps(finite(report), indent=2, allow_nan=False))
    lines.print(summary(report))
    return 0 if report["passed"] else 1


class Lines:
    """Prints findings as they come; on a terminal also the check that is running."""

    def __init__(self, stream: Any):
        self.stream, self.live = stream, stream.isatty()

    def began(self, name: str) -> None:
        if self.live:
            print(f"\r\x1b[K        {name} ...", end="", file=self.stream, flush=True)

    def found(self, finding: Finding) -> None:
        self.print(line(finding))

    def print(self, text: str) -> None:
        start = "\r\x1b[K" if self.live else ""
        print(start + text, file=self.stream, flush=True)


def line(finding: Finding) -> str:
    """A finding as text: its status, name and figures, with the remedy on a line of its own."""
    word = WORDS.get(finding.status, finding.status)
    remedy = f"\n        {finding.remedy}" if finding.remedy else ""
    return f"{word:<8}{finding.name:<32}{finding.text}{remedy}"


def header(launch: Launch, device: str, processes: int) -> str:
    machines = (
        f"{launch.machines} machines (this is number {launch.machine_rank})"
        if launch.machines > 1
        else "1 machine"
    )
    backend = "gloo" if device == "cpu" else "NCCL"
    count = f"{processes} process{'es' if processes > 1 else ''}"
    return f"checking {count} on {machines}: {device}, {backend}"


def summary(report: dict) -> str:
    """The last line: passed or FAILED, and what is wrong, broken or slow."""
    findings = report["findings"]
    names: dict[str, list[str]] = {status: [] for status in ("broken", "wrong", "slow", "skipped")}
    for finding in findings:
        if finding["status"] in names:
            names[finding["status"]].append(finding["name"])
    counts = [f"{status}: {', '.join(dict.fromkeys(found))}" for status, found in names.items() if found]
    word = "passed" if report["passed"] else "FAILED"
    return "; ".join([f"{word}: {len(findings)} findings", *counts])
