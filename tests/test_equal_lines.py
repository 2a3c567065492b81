"""No code lies in two places: runs of equal lines in ``src`` and ``tests`` are found here, and one of them has to go."""

import ast
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
#: so many equal lines may stand in two places
MOST = 12

#: pairs of files whose equal lines may stay, each with the reason
ALLOWED: dict[tuple[str, str], str] = {}


class Equal(NamedTuple):
    """A run of equal lines: where it begins in both files, and how many lines of code it has."""

    first: str
    first_line: int
    second: str
    second_line: int
    length: int

    def __str__(self):
        return (
            f"{self.first}:{self.first_line} and {self.second}:{self.second_line}: {self.length} equal lines"
        )


def lines_of_code(text):
    """(number, stripped text) of each line that is not blank and belongs to no import and no comment."""
    imports = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [
        (number, line)
        for number, line in stripped
        if line and not line.startswith("#") and number not in imports
    ]


def equal_runs(texts, most=MOST):
    """The longest runs of more than ``most`` equal consecutive lines of code, between files and inside each.

    Args:
        texts: the text of each file by its name.

    Returns:
        One ``Equal`` for each pair of places; inside one file, the two runs do not overlap.
    """
    code = {name: lines_of_code(text) for name, text in texts.items()}
    lines = {name: [line for _, line in numbered] for name, numbered in code.items()}
    places = defaultdict(list)
    for name in sorted(lines):
        for start in range(len(lines[name]) - most):
            places[tuple(lines[name][start : start + most + 1])].append((name, start))
    runs = []
    for found in places.values():
        for (first, i), (second, j) in combinations(found, 2):
            a, b = lines[first], lines[second]
            if i and j and a[i - 1] == b[j - 1]:
                continue  # This pair lies inside a longer run, which is reported from its beginning.
            end = min(len(a) - i, len(b) - j, j - i if first == second else len(a))
            length = next((n for n in range(end) if a[i + n] != b[j + n]), end)
            if length > most:
                runs.append(Equal(first, code[first][i][0], second, code[second][j][0], length))
    return sorted(runs)


def test_no_run_of_lines_stands_in_two_places():
    texts = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("src", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    runs = equal_runs(texts)
    pairs = {(run.first, run.second) for run in runs}
    assert not [str(run) for run in runs if (run.first, run.second) not in ALLOWED]
    assert not ALLOWED.keys() - pairs, "these pairs of files have no equal lines any more"


def invented(*lines):
    return "\n".join(lines) + "\n"


def test_equal_lines_are_found_between_files_and_inside_one():
    block = [f"x{n} = {n}" for n in range(MOST + 1)]
    spread = [line for code in block for line in ("    # A comment is no code.", f"    {code}", "")]
    first = invented("import os", *block, "y = 1")
    second = invented("def f():", '    """Nothing."""', *spread, "    return 2")
    assert list(map(str, equal_runs({"a.py": first, "b.py": second}))) == [
        f"a.py:2 and b.py:4: {MOST + 1} equal lines"
    ]
    assert list(map(str, equal_runs({"a.py": first + first}))) == [
        f"a.py:2 and a.py:{MOST + 5}: {MOST + 2} equal lines"
    ]


def test_a_shorter_run_and_equal_imports_are_not_found():
    block = [f"x{n} = {n}" for n in range(MOST)]
    names = [f"    name{n}," for n in range(2 * MOST)]
    first = invented("from names import (", *names, ")", *block, "y = 1")
    second = invented("from names import (", *names, ")", *block, "y = 2")
    assert not equal_runs({"a.py": first, "b.py": second})
    assert not equal_runs({"a.py": invented(*["x += 1"] * 2 * MOST)})
