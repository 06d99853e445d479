"""The lessons of models, reports and the command line, and the guides, run from top to bottom; see test_notebooks.py."""
import pytest
from test_notebooks import BASICS, NOTEBOOKS, check_runs


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name not in BASICS], ids=lambda p: p.stem)
def test_notebook_runs(path):
    check_runs(path)
