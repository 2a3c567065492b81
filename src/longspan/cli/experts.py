"""``longspan experts``: how evenly a run has used its experts, layer by layer and over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from longspan.cli.options import positionals, read_picture, take_options
from longspan.errors import UserError

USAGE = """\
usage: longspan experts OUTPUT_DIR [--png FILE] [--json]

Reads metrics.jsonl of a run and prints for each layer with experts the share of the choices that the busiest and
the idlest expert had in the last tenth of the steps. 1.00 x is an even load.

  --png FILE   draw the load of every expert over the steps (pip install 'longspan[plot]')
  --json       print {steps: [first, last], layers: [{layer, busiest, idlest, load: [share of each expert]}], dropped}"""
OPTIONS = {"--png": True, "--json": False}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    taken, rest, problems = take_options(arguments, OPTIONS)
    given = positionals(rest, OPTIONS, problems)
    picture = read_picture(taken["--png"], problems) if "--png" in taken else None
    if len(given) != 1:
        problems.append(
            f"longspan experts takes one output_dir; found {len(given)}. See longspan experts --help."
        )
    if problems:
        raise UserError(problems)
    records = read_loads(Path(given[0]))
    result = summary(records)
    if picture is not None:
        from longspan.cli.experts_picture import draw

        layers = [row["layer"] for row in result["layers"]]
        draw([r["step"] for r in records], layers, [r["moe_load"] for r in records], picture)
        result["png"] = str(picture)
    if "--json" in taken:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)
    return 0


def read_loads(output: Path) -> list[dict]:
    """The records of a run's steps, which hold the load of experts.

    Raises:
        UserError: there is no record of experts.
    """
    from longspan.training.metrics import records_of_kind

    path = output / "metrics.jsonl" if output.is_dir() else output
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give the output_dir of a run.")
    records = [r for r in records_of_kind(path, "train") if r.get("moe_load")]
    if not records:
        raise UserError(
            f"{path} records no load of experts: its model has none (num_moe_experts), or no step was done."
        )
    return records


def summary(records: list[dict]) -> dict:
    """The means over the last tenth of the steps, and the choices dropped in all."""
    last = records[-max(1, len(records) // 10) :]
    loads = [r["moe_load"] for r in last]
    numbers = last[0].get("moe_layers") or range(1, len(loads[0]) + 1)
    layers = []
    for at, number in enumerate(numbers):
        load = [sum(step[at][e] for step in loads) / len(loads) for e in range(len(loads[0][at]))]
        busiest, idlest = max(load) * len(load), min(load) * len(load)
        layers.append({"layer": number, "busiest": busiest, "idlest": idlest, "load": load})
    dropped = sum(r.get("moe_dropped_tokens", 0) for r in records)
    return {"steps": [last[0]["step"], last[-1]["step"]], "layers": layers, "dropped": dropped}


def print_table(result: dict) -> None:
    first, last = result["steps"]
    print(f"load of experts in steps {first} to {last}, where 1.00 x is an even load")
    print("  layer  busiest            idlest")
    for row in result["layers"]:
        load = row["load"]
        names = (load.index(max(load)), load.index(min(load)))
        print(
            f"  {row['layer']:>5}  {row['busiest']:5.2f} x expert {names[0]:<4}  {row['idlest']:5.2f} x expert {names[1]}"
        )
    if result["dropped"]:
        print(f"dropped in all: {result['dropped']:,} choices")
    if "png" in result:
        print(f"picture: {result['png']}")
