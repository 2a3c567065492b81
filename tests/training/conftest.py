import pytest

import llamas


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama, as a folder of transformers."""
    return llamas.make_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Random adapters of ``base``, as a folder of PEFT."""
    return llamas.make_adapters(base, tmp_path_factory.mktemp("adapters"))
