"""The launcher's options: the number of processes, their machines, and what starts them."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.cli.options import number
from longspan.errors import did_you_mean
from longspan.runs.start import Launch, option_names

OPTIONS = {
    "--num-processes": True,
    "--num-machines": True,
    "--machine-rank": True,
    "--main-process-ip": True,
    "--main-process-port": True,
    "--launcher": True,
}
HELP = """\
  --num-processes N      processes over all machines (default: on CPU the product of the parallel
                         sizes, on a GPU machine all its GPUs)
  --num-machines M, --machine-rank R, --main-process-ip IP, --main-process-port P
                         several machines: run the same command on each, with its own rank
  --launcher torchrun    pass what follows -- to torchrun
"""


def split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before ``--``, and those after it, which are torchrun's."""
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def read_launch(taken: dict[str, str], torchrun_arguments: list[str], problems: list[str]) -> Launch:
    """Reads the launcher's options; mistakes are added to ``problems``."""
    machines = number(taken, "--num-machines", problems) or 1
    rank = number(taken, "--machine-rank", problems, least=0) or 0
    port = number(taken, "--main-process-port", problems, most=65535) or (29500 if machines > 1 else 0)
    processes = number(taken, "--num-processes", problems)
    launcher = taken.get("--launcher", "torchrun")
    if launcher != "torchrun":
        problems.append(
            f"--launcher {launcher!r}: torchrun is the one there is.{did_you_mean(launcher, ['torchrun'])}"
        )
    if machines > 1 and "--main-process-ip" not in taken:
        problems.append(f"--num-machines {machines} needs --main-process-ip: the address of machine 0.")
    if rank >= machines:
        problems.append(f"--machine-rank {rank} with --num-machines {machines}: from 0 to {machines - 1}.")
    if processes is not None and processes % machines:
        problems.append(f"--num-processes {processes} does not divide by --num-machines {machines}.")
    if torchrun_arguments and "--launcher" not in taken:
        problems.append("what follows -- is for torchrun: add --launcher torchrun, or leave it out.")
    elif torchrun_arguments:
        machines, processes = _counts(torchrun_arguments, machines, processes, problems)
    return Launch(
        processes, machines, rank, taken.get("--main-process-ip", "127.0.0.1"), port, torchrun_arguments
    )


def _counts(
    given: list[str], machines: int, processes: int | None, problems: list[str]
) -> tuple[int, int | None]:
    """(machines, processes on all of them) from torchrun's own arguments and longspan's options."""
    import contextlib
    import io

    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = get_args_parser().parse_args([*given, "longspan"])
    except SystemExit:
        text = said.getvalue().strip().rsplit("error: ", 1)[-1]
        problems.append(f"-- {' '.join(given)}: torchrun does not take it: {text}.")
        return machines, processes
    if parsed.training_script != "longspan":
        problems.append(
            f"-- {' '.join(given)}: {parsed.training_script!r} is no option of torchrun; what runs is longspan."
        )
        return machines, processes
    nodes = str(parsed.nnodes).rsplit(":", 1)[-1]
    if "--nnodes" in option_names(given) and nodes.isdigit():
        if machines not in (1, int(nodes)):
            problems.append(f"--num-machines {machines} and torchrun's --nnodes {parsed.nnodes}: give one.")
        machines = int(nodes)
    each = str(parsed.nproc_per_node)
    if "--nproc-per-node" in option_names(given) and each.isdigit():
        if processes not in (None, int(each) * machines):
            problems.append(
                f"--num-processes {processes} and torchrun's --nproc-per-node {each} on {machines} machines: give one."
            )
        processes = int(each) * machines
    return machines, processes
