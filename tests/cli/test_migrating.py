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


def is_known_flag(flag):
    if flag in LAUNCH_OPTIONS:
        return True
    name = flag[2:].replace("-", "_")
    found = parse_overrides([flag], list(LAUNCH_OPTIONS))
    return (name in option_table() or name in EXTERNAL_NAMES) and not any(
        "unknown" in p for p in found.problems
    )


def test_every_flag_is_known():
    assert not [flag for flag in (*documents.FLAGS, *documents.LAUNCHER) if not is_known_flag(flag)]


def test_flags_of_the_data_tools_are_options_of_prepare():
    flags = {"--input", "--output-prefix", "--json-keys", "--split-sentences"}
    assert flags <= {*documents.OTHERS}
    assert not flags - {*FILE_OPTIONS}


def is_known_key(key):
    if key.startswith("datasets."):
        return key.removeprefix("datasets.") in DatasetConfig.model_fields
    outer, _, inner = key.partition(".")
    values = {outer: {inner: None}} if inner else {outer: None}
    return (key in names() or key in EXTERNAL_NAMES) and not any(
        "unknown" in p for p in make_config(values).problems
    )


def test_every_key_is_known():
    assert not [key for key in documents.KEYS if not is_known_key(key)]


def test_every_variable_is_handled():
    assert not [name for name in documents.VARIABLES if name not in VARIABLES]


def test_what_the_page_points_to_is_there():
    missing = []
    for name, place in documents.NAMES.items():
        module, _, attribute = (place or "").rpartition(".")
        if place is not None and not hasattr(importlib.import_module(module), attribute):
            missing.append(f"{name} -> {place}")
    assert not missing


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
