"""The first minutes on a GPU: what works, how exact it is, how fast, against what. Under 8 minutes in all.

    make gpu-check                                                      on this machine
    python benchmarks/gpu_check.py [--wheels DIR] [--out DIR]           anywhere, nothing installed but torch
    python benchmarks/gpu_check.py --download DIR                       fetches the wheels, where there is a network
    python benchmarks/gpu_check.py --device cpu --tiny                  runs all code once, without a GPU

It needs Python, torch >= 2.11 and numpy. Other packages that are missing are installed from ``--wheels`` into a
folder of their own that is removed at the end. Nothing is fetched.

Every part runs in a process of its own under a time limit, so a crash or a hang costs that part only. What it has
found until then is kept. ``--out`` then holds

    gpu_check.json    the machine, the parts and all rows
    rows.jsonl        the rows, one a line, written as they come
    log.txt           everything that was printed

The exit code is 1 where a result is wrong, or a part failed or ran out of time. A machine without a GPU runs to the
end, with everything skipped, and gives 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Part:
    """``module.function(rows, device, tiny)``, with seconds it may take."""

    name: str
    what: str
    seconds: int
    module: str


#: the most important first
PARTS = (
    Part("tests", "the tests marked gpu", 170, "gpu_tests"),
    Part("attention", "every attention backend against float64, forward and backward", 70, "gpu_attention"),
    Part("step", "one step of a small Llama against the CPU's float32", 80, "gpu_training"),
    Part("cutting", "the price of cutting: tiles with merging against one flash call", 60, "gpu_attention"),
    Part("recurrent", "the scans of recurrent layers against float64, and their time", 40, "gpu_recurrent"),
    Part("speed", "a 1B-class model at 8K and 32K, with and without each memory key", 110, "gpu_training"),
    Part("peer", "transformers of the same sizes on the same card", 70, "gpu_training"),
    Part("compiled", "torch_compile on and off", 90, "gpu_training"),
    Part("parameters", "offload_params", 50, "gpu_training"),
)

#: what is imported -> the wheels that bring it
PACKAGES = {
    "pydantic": ("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    "yaml": ("pyyaml",),
    "rich": ("rich", "markdown_it_py", "mdurl", "pygments"),
    "tokenizers": ("tokenizers",),
    "safetensors": ("safetensors",),
    "jinja2": ("jinja2", "markupsafe"),
    "filelock": ("filelock",),
    "pytest": ("pytest", "iniconfig", "pluggy", "packaging", "pygments"),
    "hypothesis": ("hypothesis", "sortedcontainers"),
}
#: these need packages of a network, which nothing here uses
ALONE = ("tokenizers", "safetensors")
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


# --- wheels -----------------------------------------------------------------------------------


def download(folder: Path) -> None:
    """Fetches the wheels for several versions of Python into a folder of 20 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    together = [wheels[0] for wheels in PACKAGES.values() if wheels[0] not in ALONE]
    for version in PYTHONS:
        base = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "-d", str(folder)]
        base += ["-c", str(ROOT / "constraints.txt"), "--implementation", "cp", "--python-version", version]
        for name in PLATFORMS:
            base += ["--platform", name]
        for names in (together, ["--no-deps", *ALONE]):
            subprocess.run([*base, *names], check=True)
    total = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels, {total / 1e6:.0f} MB, in {folder}")


def missing(packages: Mapping[str, tuple[str, ...]] = PACKAGES) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def install(wheels: Path | None, site: Path, packages: Mapping[str, tuple[str, ...]] = PACKAGES) -> list[str]:
    """Installs what is missing from the folder of wheels into ``site``; returns what is missing still."""
    wanted = sorted({wheel for name in missing(packages) for wheel in packages[name]})
    if wheels is None or not wanted:
        return missing(packages)
    held = {path.name.split("-")[0].lower() for path in wheels.glob("*.whl")}
    names = [name for name in wanted if name in held]
    if names:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--find-links", str(wheels), "--target", str(site), *names]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout + done.stderr, end="")
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    return missing(packages)


# --- running ----------------------------------------------------------------------------------

PROBE = """
import json, torch
about = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    held = torch.cuda.get_device_properties(0)
    about |= {"gpu": held.name, "memory_gib": held.total_memory / 2**30, "capability": [held.major, held.minor]}
    about["device_matmul"] = float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
print(json.dumps(about))
"""


def machine(environment: dict[str, str]) -> dict:
    """Versions and the GPU, asked in a process of its own: a broken driver ends that one."""
    about = {"python": platform.python_version(), "cores": os.cpu_count(), "gpu": None}
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, env=environment
        )
        return about | json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        text = "" if isinstance(error, subprocess.TimeoutExpired) else done.stderr.strip()[-400:]
        return about | {"problem": text or f"{type(error).__name__} while asking torch for its device"}


def end(process: subprocess.Popen) -> None:
    """Ends a part and what it started: a request, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def run_part(
    part: Part,
    seconds: float,
    out: Path,
    options: list[str],
    environment: dict[str, str],
    end: Callable[[subprocess.Popen], None] = end,
) -> dict:
    """Runs one part; its output goes to the screen and to the log as it comes.

    Args:
        end: ends a part that runs beyond its seconds.
    """
    command = [sys.executable, str(HERE / "gpu_check.py"), "--part", part.name, "--out", str(out), *options]
    begun, how = time.monotonic(), "ran"
    with (out / "log.txt").open("ab", buffering=0) as log:
        log.write(f"\n=== {part.name}: {part.what}\n".encode())
        at = log.tell()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        with (out / "log.txt").open("rb") as shown:
            shown.seek(at)
            while process.poll() is None:
                time.sleep(0.2)
                sys.stdout.write(shown.read().decode(errors="replace"))
                sys.stdout.flush()
                if time.monotonic() - begun > seconds:
                    how = f"ended after its {seconds:.0f} s"
                    end(process)
                    break  # a driver may hold a process that nothing ends
            sys.stdout.write(shown.read().decode(errors="replace"))
    if how == "ran" and process.returncode:
        how = f"failed with exit code {process.returncode}"
    return {
        "name": part.name,
        "what": part.what,
        "seconds": round(time.monotonic() - begun, 1),
        "result": how,
    }


def rows_of(out: Path) -> list[dict]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(out: Path, about: dict, parts: list[dict]) -> dict:
    """Writes what there is so far; a reader never sees half a file."""
    report = {"machine": about, "parts": parts, "rows": rows_of(out)}
    new = out / "gpu_check.json.new"
    new.write_text(json.dumps(report, indent=1))
    new.replace(out / "gpu_check.json")
    return report


def show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(report: dict) -> str:
    """All rows by part, in plain text: it is read in logs."""
    lines = []
    for part in report["parts"]:
        lines.append(f"\n{part['name']}: {part['what']} ({part['result']}, {part['seconds']} s)")
        for row in report["rows"]:
            if row["part"] != part["name"]:
                continue
            verdict = {None: "  ", True: "ok", False: "WRONG"}[row["ok"]]
            numbers = "  ".join(f"{name} {show(value)}" for name, value in row["numbers"].items())
            lines.append(f"  {verdict:<5} {row['case']:<56} {numbers}  {row['note']}".rstrip())
    return "\n".join(lines)


def failed(report: dict) -> bool:
    """Whether a row is wrong, or a part did not come to its end."""
    return any(row["ok"] is False for row in report["rows"]) or any(
        part["result"] != "ran" and not part["result"].startswith("skipped") for part in report["parts"]
    )


def main(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * args.minutes
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "log.txt", "gpu_check.json"):
        (out / name).unlink(missing_ok=True)
    site = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        without = install(args.wheels, site)
        paths = [str(p) for p in (ROOT / "src", ROOT / "tests", HERE, site)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        about = machine(environment)
        device = args.device if args.device != "auto" else "cuda"
        print(json.dumps(about))
        reason = ""
        if without:
            reason = f"{', '.join(without)} not installed; give --wheels, a folder made with --download"
        elif device == "cuda" and about["gpu"] is None:
            reason = about.get("problem") or "no CUDA device"
        chosen = [part for part in PARTS if not args.only or part.name in args.only]
        print(f"to run on {device}, within {args.minutes:g} minutes:")
        for part in chosen:
            print(f"  {part.name:<12} {part.what} (at most {part.seconds} s)")
        options = ["--device", device, *(["--tiny"] if args.tiny else [])]
        parts: list[dict] = []
        for part in chosen:
            left = deadline - time.monotonic()
            if reason or left < 10:
                result = f"skipped: {reason or 'no time left'}"
                parts.append({"name": part.name, "what": part.what, "seconds": 0, "result": result})
            else:
                print(f"\n=== {part.name}: {part.what}", flush=True)
                limit = min(args.part_seconds or part.seconds, left)
                parts.append(run_part(part, limit, out, options, environment))
            report = save(out, about, parts)
        print(table(report))
        print(f"\n{out / 'gpu_check.json'}, {out / 'log.txt'}")
        # packages that are missing are the caller's to give; a machine without a GPU is as it is
        return 1 if without or failed(report) else 0
    finally:
        shutil.rmtree(site, ignore_errors=True)


def run_here(args: argparse.Namespace) -> int:
    """One part, in the process that :func:`run_part` started for it."""
    import torch
    from common import Rows

    part = next(part for part in PARTS if part.name == args.part)
    function = getattr(importlib.import_module(part.module), part.name)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    function(Rows(args.out / "rows.jsonl", part.name), device, args.tiny)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_check"), metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what may be missing here")
    parser.add_argument(
        "--download", type=Path, metavar="DIR", help="fetch the wheels into a folder, and end"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that the code runs, no more")
    parser.add_argument("--minutes", type=float, default=7.8, help="of all parts together")
    parser.add_argument("--part-seconds", type=float, help="instead of each part's own limit")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.download:
        download(given.download)
    else:
        sys.exit(run_here(given) if given.part else main(given))
