import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Waiting threads sleep, because spinning ones would keep other ranks from the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, os.path.dirname(__file__))  # tests import `pool` and each other's helpers by name

import hypothesis
import pytest
import torch

import command
import tiny

# What starts the tests may ignore signals (nohup, a script's background), and every process inherits that: a run
# would then rightly ignore them too. The tests of signals need them heard.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# a shared machine is slow now and then; a hanging test is ended by the pool
hypothesis.settings.register_profile("longspan", deadline=None)
hypothesis.settings.load_profile("longspan")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    yield
    command.end_all()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The prefix of tiny tokenised data."""
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def pytest_collection_modifyitems(items):
    for item in items:
        if {"pool", "command"} & vars(item.module).keys():
            item.add_marker("processes")
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            # not item.keywords: the names of folders are among those
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
