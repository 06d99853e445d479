"""Tables 3 and 4 say which CT is the reference and what the percentages are of; every label is that of what was computed."""
from __future__ import annotations

import numpy as np
import pandas as pd

from radrepro.core.volume import centred_grid, volume
from radrepro.kv2ct.dosimetry import READINGS, gamma_label, table_3, table_4
from radrepro.metrics.gamma import CRITERIA, gamma_index

GRID = centred_grid((10, 12, 14), 4.0)
X = np.broadcast_to(GRID["x"], (10, 12, 14))


def pair():
    """A truth of 20 and 900 HU, and a prediction with one hot voxel, which is the largest value only where it is the reference."""
    truth = volume(np.where(np.abs(X) < 8, 900.0, 20.0), **GRID, units="HU")
    predicted = truth.copy(data=truth.values + np.where(X > 0, 40.0, 0.0))
    predicted[{"z": 5, "y": 6, "x": 7}] = 3000.0
    return truth, predicted


def test_the_reference_is_the_one_that_the_row_names():
    truth, predicted = pair()
    rows = pd.DataFrame(table_3({"model": predicted}, truth)).set_index("detail").value
    for c in CRITERIA:
        for name, (reference, evaluated) in {"sCT": (predicted, truth), "gCT": (truth, predicted)}.items():
            for reading, by in (("HU + 1000", 1000.0), ("HU", 0.0)):
                wanted = gamma_index(reference.copy(data=reference.values + by), evaluated.copy(data=evaluated.values + by), c).pass_percent
                assert rows[f"{gamma_label(c)}, {name} as reference, {reading}"] == wanted
    strict = gamma_label(CRITERIA[2])
    # 40 HU are 2 % of (900 + 1000) and more, but less than 2 % of (3000 + 1000); and soft tissue counts on that scale only
    assert rows[f"{strict}, gCT as reference, HU + 1000"] < rows[f"{strict}, sCT as reference, HU + 1000"]
    assert rows[f"{strict}, gCT as reference, HU + 1000"] != rows[f"{strict}, gCT as reference, HU"]
    assert len(rows) == 2 * len(READINGS) * len(CRITERIA)


def test_dose_gamma_names_its_reference():
    dose = volume(np.where(np.abs(X) < 12, 60.0, 30.0), **GRID, units="Gy")
    hot = dose.copy(data=dose.values + 1.5)
    hot[{"z": 5, "y": 6, "x": 7}] = 120.0
    rows = pd.DataFrame(table_4({"model": hot}, dose)).set_index("detail").value
    # 1.5 Gy are more than 2 % of 60 Gy and less than 2 % of 120 Gy
    assert rows["2%2mm, sCT as reference"] > 99 > rows["2%2mm, gCT as reference"]
    assert set(pd.DataFrame(table_4({"model": dose}, dose)).value) == {100.0}
