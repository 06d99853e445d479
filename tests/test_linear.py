"""The linear breathing model against the law's forward equation, which it has to invert."""
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from radrepro.core.volume import centred_grid, volume
from radrepro.ct5d.linear import LinearMotion, motion_displacement, population_model
from radrepro.data.traces import Breathing

GRID = centred_grid((28, 12, 14), (10.0, 20.0, 20.0))


def breathing(amplitude, rate=0.0):
    over = lambda v: xr.DataArray(np.broadcast_to(np.asarray(v, float), 28).copy(), coords={"z": GRID["z"]}, dims="z")
    return Breathing(over(amplitude), over(rate))


def field(z_mm=0.0, y_mm=0.0, x_mm=0.0):
    parts = [np.broadcast_to(np.asarray(c, float), (28, 12, 14)) for c in (z_mm, y_mm, x_mm)]
    return volume(np.stack(parts), **GRID, units="mm")


@settings(max_examples=15, deadline=None)
@given(st.floats(-25, 25), st.floats(-6, 6), st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_uniform_motion_is_exact(alpha, beta, a_m, a_f, r_m, r_f):
    """Everything moves alike, so u = alpha (A_m - A_f) + beta (A'_m - A'_f), component by component."""
    u = motion_displacement(field(alpha, 0.5 * alpha, -0.2 * alpha), field(beta, 0, beta),
                            breathing(a_m, r_m), breathing(a_f, r_f))
    expected = alpha * np.array([1, 0.5, -0.2]) * (a_m - a_f) + beta * np.array([1, 0, 1]) * (r_m - r_f)
    np.testing.assert_allclose(u.values, np.broadcast_to(expected[:, None, None, None], u.shape), atol=1e-3)


def test_amplitude_is_that_of_the_slice_where_the_tissue_is():
    """alpha = -20 mm everywhere, A_m(z) = 0.5 + z/400: y = X_0 - 20 A_m(y), so y = (X_0 - 10) / 1.05."""
    u = motion_displacement(field(-20), field(), breathing(0.5 + GRID["z"] / 400), breathing(0.0))
    inside = np.abs(GRID["z"]) < 100
    expected = (GRID["z"] - 10) / 1.05 - GRID["z"]
    np.testing.assert_allclose(u.sel(vector="z").values[inside, 5, 5], expected[inside], atol=1e-2)
    # the fixed scan's own slices: X_0 = x + 20 A_f(x_z), and no iteration is needed
    u = motion_displacement(field(-20), field(), breathing(0.0), breathing(0.5 + GRID["z"] / 400))
    np.testing.assert_allclose(u.sel(vector="z").values[:, 5, 5], 10 + GRID["z"] / 20, atol=1e-3)


def test_tissue_carries_its_own_amplitude():
    """alpha_z(X_0) = -0.1 (150 - X_0): X = X_0 + alpha A is linear in X_0, so both directions have closed forms."""
    alpha = field(-0.1 * (150 - GRID["z"])[:, None, None])
    u = motion_displacement(alpha, field(), breathing(0.2), breathing(0.9))
    z = GRID["z"]
    rest = (z + 13.5) / 1.09  # z = X_0 - 0.09 (150 - X_0)
    expected = rest - 0.02 * (150 - rest) - z
    inside = (rest < GRID["z"][-1]) & (np.abs(z) < 120)  # alpha is only known on the grid
    np.testing.assert_allclose(u.sel(vector="z").values[inside, 5, 5], expected[inside], atol=0.02)


def test_same_breathing_moves_nothing_and_swapping_scans_undoes():
    z, y, x = np.meshgrid(*(GRID[a] for a in "zyx"), indexing="ij")
    alpha = field(-15 / (1 + np.exp(z / 30)), -3 * np.exp(-((y / 60) ** 2)), 2 * np.tanh(x / 60))
    beta = field(0.2 * alpha.values[0])
    m = breathing(0.5 + 0.4 * np.sin(GRID["z"] / 50), 0.3 * np.cos(GRID["z"] / 50))
    f = breathing(0.2 + GRID["z"] / 600, -0.2)
    assert np.abs(motion_displacement(alpha, beta, m, m)).max() < 1e-2
    there, back = motion_displacement(alpha, beta, m, f), motion_displacement(alpha, beta, f, m)
    assert np.abs(there).max() > 2
    points = {a: (a3 + there.values[i]) for i, (a, a3) in enumerate(zip("zyx", (z, y, x)))}
    inside = np.logical_and.reduce([np.abs(points[a]) < np.abs(GRID[a][0]) for a in "zyx"])
    where = {a: xr.DataArray(points[a], dims=("k", "j", "i")) for a in "zyx"}
    total = there.values + back.interp(where).transpose("vector", "k", "j", "i").values  # back at x + there(x)
    assert np.abs(total[:, inside]).max() < 0.6  # the field is interpolated on 10 x 20 x 20 mm


def test_mean_patient():
    patients = [SimpleNamespace(alpha_mm=field(k, 1, 0), beta_mm=field(0, 0, k)) for k in (-5, -10, -30)]
    mean = population_model(patients)
    assert isinstance(mean, LinearMotion)
    np.testing.assert_allclose(mean.alpha_mm.values, field(-15, 1, 0).values)
    np.testing.assert_allclose(mean.beta_mm.values, field(0, 0, -15).values)
    assert mean.alpha_mm.attrs["units"] == "mm" and patients[0].alpha_mm.values[0].max() == -5  # inputs untouched


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="at least one training patient"):
        population_model([])
    other = SimpleNamespace(alpha_mm=field().assign_coords(z=GRID["z"] + 3), beta_mm=field())
    with pytest.raises(ValueError, match="resample the fields first"):
        population_model([SimpleNamespace(alpha_mm=field(), beta_mm=field()), other])
    with pytest.raises(ValueError, match="stack its components"):
        motion_displacement(field()[0].drop_vars("vector"), field(), breathing(0), breathing(0))
    gap = breathing(0.5)
    gap.amplitude[3] = np.nan
    with pytest.raises(ValueError, match="fixed: expected finite amplitude"):
        motion_displacement(field(), field(), breathing(0.5), gap)
    with pytest.raises(ValueError, match="moving: expected amplitude over the slices"):
        motion_displacement(field(), field(), breathing(0.5)._replace(amplitude=gap.amplitude[8:]), breathing(0.5))
