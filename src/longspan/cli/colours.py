"""The colours of pictures and pages, without matplotlib."""

#: eight colours, distinct for people who see no red or no green (Okabe and Ito, 2008; grey instead of black)
EIGHT = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#7F7F7F")
INK, PALE = "#222222", "#E6E6E6"


def colours_of(names: list[str], fixed: dict[str, str] | None = None) -> dict[str, str]:
    """name -> a colour; more than eight names take the colours again, lighter.

    Args:
        fixed: names whose colours are given.
    """
    fixed = fixed or {}
    free = [colour for colour in EIGHT if colour not in fixed.values()]
    others = [name for name in names if name not in fixed]
    chosen = {}
    for i, name in enumerate(others):
        colour = free[i % len(free)]
        chosen[name] = _lighter(colour, i // len(free))
    return {name: fixed.get(name) or chosen[name] for name in names}


def _lighter(colour: str, times: int) -> str:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    for _ in range(times):
        parts = [(part + 255) // 2 for part in parts]
    return "#" + "".join(f"{part:02X}" for part in parts)
