"""Fixtures shared by the tests."""
import os
from pathlib import Path

import pytest
from made_up import write_clinic


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data (layout: its README), named by RADREPRO_DATA; tests that need it skip without it."""
    folder = os.environ.get("RADREPRO_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data are never shipped: set RADREPRO_DATA to a folder that has them")
    return Path(folder)


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    """A data_dir of made-up patients."""
    root = tmp_path_factory.mktemp("clinic")
    write_clinic(root)
    return root
