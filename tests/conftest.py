import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, os.path.dirname(__file__))  # tests import `pool` and each other's helpers by name

import hypothesis
import pytest
import torch

# a shared machine is slow now and then; a hanging test is ended by the pool
hypothesis.settings.register_profile("longspan", deadline=None)
hypothesis.settings.load_profile("longspan")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            # not item.keywords: the names of folders are among those
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
