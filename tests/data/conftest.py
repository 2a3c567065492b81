import pytest

import chats


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The folder of a tokenizer with the special tokens of several families of models."""
    return chats.write_family_tokenizer(tmp_path_factory.mktemp("tokenizer"))
