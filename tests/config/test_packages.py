"""Optional packages are asked for without importing them."""

from longspan.config.packages import has_package


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """python -m puts the current directory first on the path, and data often lies in a folder called datasets."""
    (tmp_path / "surely_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not has_package("surely_no_package")
    assert not has_package("nothing_of_that_name")
    assert has_package("torch")
