"""docs/migrating.md names everything that the users' documents name, and what it says of flags and keys is true."""

import importlib
import re
from pathlib import Path

import documents
import pytest

from longspan.cli.launch import OPTIONS as LAUNCH_OPTIONS
from longspan.cli.prepare import FILE_OPTIONS
from longspan.cli.reference import markdown
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.load import make_config
from longspan.config.options import option_table, parse_overrides
from longspan.config.schema import DatasetConfig, names
from longspan.runs.environment import VARIABLES

ROOT = Path(__file__).parents[2]
PAGES = ["docs/migrating.md", "docs/migrating.zh-CN.md"]
ALL = [
    *documents.FLAGS,
    *documents.KEYS,
    *documents.LAUNCHER,
    *documents.OTHERS,
    *documents.COMMANDS,
    *documents.VARIABLES,
    *documents.VALUES,
    *documents.NAMES,
    *documents.MODULES,
]


def code_of(page):
    """The page's words in code."""
    return " ".join(re.findall(r"`([^`]+)`", (ROOT / page).read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_both_pages_name_everything(page):
    code = code_of(page)
    missing = [name for name in ALL if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", code)]
    assert not missing


def test_both_pages_say_the_same():
    """As many tables, rows and remarks, and the same names in the same rows."""

    def rows(page):
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        return [re.findall(r"--[\w-]+|\w+_\w+", line) for line in lines if line.startswith("|")]

    english, chinese = (rows(page) for page in PAGES)
    assert len(english) == len(chinese)
    for a, b in zip(english, chinese):
        assert set(a) == set(b)


@pytest.mark.parametrize("flag", [*documents.FLAGS, *documents.LAUNCHER])
def test_every_flag_is_known(flag):
    name = flag[2:].replace("-", "_")
    assert name in option_table() or name in EXTERNAL_NAMES or flag in LAUNCH_OPTIONS
    found = parse_overrides([flag], list(LAUNCH_OPTIONS)) if flag not in LAUNCH_OPTIONS else None
    assert found is None or not any("unknown" in problem for problem in found.problems)


@pytest.mark.parametrize("flag", [f for f in documents.OTHERS if f in ("--input", "--output-prefix", "--json-keys", "--split-sentences")])  # fmt: skip
def test_flags_of_the_data_tools_are_options_of_prepare(flag):
    assert flag in FILE_OPTIONS


@pytest.mark.parametrize("key", documents.KEYS)
def test_every_key_is_known(key):
    if key.startswith("datasets."):
        assert key.removeprefix("datasets.") in DatasetConfig.model_fields
    else:
        assert key in names() or key in EXTERNAL_NAMES
        outer, _, inner = key.partition(".")
        values = {outer: {inner: None}} if inner else {outer: None}
        assert not any("unknown" in problem for problem in make_config(values).problems)


@pytest.mark.parametrize("name", documents.VARIABLES)
def test_every_variable_has_a_fate(name):
    assert name in VARIABLES


@pytest.mark.parametrize(("name", "place"), [(n, p) for n, p in documents.NAMES.items() if p is not None])
def test_what_the_page_points_to_is_there(name, place):
    module, _, attribute = place.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), f"{name} -> {place}"


def test_the_page_of_all_keys_is_not_stale():
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == markdown(), (
        "docs/keys.md is stale: make docs"
    )


def test_the_page_of_all_keys_has_every_key_and_other_name():
    page = markdown()
    missing = [
        n
        for n in (*names(), *EXTERNAL_NAMES)
        if f"`{n}`" not in page and f"`--{n.replace('_', '-')}`" not in page
    ]
    assert not missing
    for line in page.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert cells in (3, 4, 5), line
