"""Gamma against brute force, against its scaling law and symmetries, and against another's implementation."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from radrepro.core.volume import AXES, centred_grid, resample, volume
from radrepro.metrics.gamma import CRITERIA, Criterion, _gamma_torch, gamma_index


def _random(shape, mm, seed, smooth=1.2, scale=60.0):
    values = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), smooth)
    values = (values - values.min()) / np.ptp(values)
    return volume((scale * values).astype(np.float32), **centred_grid(shape, mm), units="Gy")


def _brute(reference, evaluated, criterion):
    """Every point of the sub-grid in turn, in double precision."""
    n, h = int(criterion.cap * criterion.fraction), criterion.distance_mm / criterion.fraction
    k = np.arange(-n, n + 1)
    k = np.stack(np.meshgrid(k, k, k, indexing="ij"), -1).reshape(-1, 3)
    k = k[(k**2).sum(1) <= n * n]
    of = criterion.of or float(reference.max())
    out = np.full(reference.shape, np.nan)
    for p in np.ndindex(reference.shape):
        wanted = float(reference.values[p])
        if wanted < criterion.cutoff_percent / 100 * of:
            continue
        dd = criterion.percent / 100 * (abs(wanted) if criterion.local else of)
        here = np.array([float(reference[a][i]) for a, i in zip(AXES, p)])
        index = np.stack([(here[i] + k[:, i] * h - float(evaluated[a][0])) / float(evaluated[a][1] - evaluated[a][0])
                          for i, a in enumerate(AXES)])
        ok = ((index >= -1e-6) & (index <= np.array(evaluated.shape)[:, None] - 1 + 1e-6)).all(0)
        value = ndimage.map_coordinates(evaluated.values.astype(float), index[:, ok], order=1, mode="nearest")
        square = (k[ok] ** 2).sum(1) / criterion.fraction**2 + ((value - wanted) / dd) ** 2
        out[p] = np.sqrt(min(square.min(), criterion.cap**2))
    return out


@pytest.mark.parametrize("spacing", [(4.0, 4.0, 4.0), (2.0, 3.5, 1.1)])
@pytest.mark.parametrize("criterion", [Criterion(3, 3, fraction=5), Criterion(2, 2, fraction=7, local=True), Criterion(4, 2.5, fraction=6, of=30.0, cap=1.5)])
def test_it_is_the_minimum_over_the_sub_grid(spacing, criterion):
    reference, evaluated = _random((7, 6, 8), spacing, 0), _random((7, 6, 8), spacing, 0)
    evaluated = evaluated.copy(data=0.7 * evaluated.values + 0.3 * _random((7, 6, 8), spacing, 1).values)
    found = gamma_index(reference, evaluated, criterion)
    brute = _brute(reference, evaluated, criterion)
    assert np.array_equal(np.isfinite(brute), np.isfinite(found.values.values))
    np.testing.assert_allclose(found.values.values, brute, atol=2e-5)
    assert len(np.unique(brute[np.isfinite(brute)])) > 30  # not all at the cap, not all zero


def test_grids_may_differ():
    fine = _random((9, 10, 11), (2.0, 2.0, 2.5), 3)
    inner = {a: fine[a].values[2:-2] + 0.37 for a in AXES}
    reference, criterion = resample(_random((9, 10, 11), (2.0, 2.0, 2.5), 4), inner, fill=np.nan), Criterion(3, 3, fraction=5, cutoff_percent=0)
    reference = reference.copy(data=0.8 * resample(fine, inner, fill=np.nan).values + 0.2 * reference.values)
    np.testing.assert_allclose(gamma_index(reference, fine, criterion).values.values, _brute(reference, fine, criterion), atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(k=st.integers(2, 4), seed=st.integers(0, 50))
def test_scaling_both_tolerances_divides_gamma(k, seed):
    reference, evaluated = _random((6, 7, 6), 3.0, seed), _random((6, 7, 6), 3.0, seed + 100)
    one = gamma_index(reference, evaluated, Criterion(4, 3, fraction=4, cap=8)).values.values
    scaled = gamma_index(reference, evaluated, Criterion(4 * k, 3 * k, fraction=4 * k, cap=8 / k if 8 / k > 1 else 1.01)).values.values
    below = np.isfinite(one) & (one < min(8, 1.01 * k) - 1e-3)
    np.testing.assert_allclose(scaled[below], one[below] / k, atol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_shifts_are_seen_alike_in_both_directions_along_each_axis(axis):
    grid = centred_grid((21, 21, 21), (3.0, 2.0, 2.5))
    ball = lambda **at: volume(60 * np.exp(-sum(((grid[a] - at.get(a, 0.0)) / 12).reshape([-1 if b == a else 1 for b in AXES]) ** 2 for a in AXES)),
                               **grid, units="Gy")
    there, back = (gamma_index(ball(), ball(**{axis: s}), Criterion(3, 2, cutoff_percent=20)) for s in (1.0, -1.0))
    assert there.pass_percent == 100 and there.values.max() < 0.65  # half of the DTA; linear interpolation takes a little off the peak
    assert abs(there.values - back.values[{a: slice(None, None, -1) for a in AXES}].values).max() < 1e-4
    far = gamma_index(ball(), ball(**{axis: 6.0}), Criterion(3, 2, cutoff_percent=20))
    assert far.pass_percent < 40


def test_what_cannot_be_compared_fails_and_is_counted():
    dose = volume(np.full((8, 8, 8), 50.0), **centred_grid((8, 8, 8), 2.0), units="Gy")
    holed = dose.copy(deep=True)
    holed[{"z": 1, "y": 1, "x": 1}] = np.nan
    for pair in ((holed, dose), (dose, holed)):
        found = gamma_index(*pair, CRITERIA[0])
        assert (found.n_compared, found.n_nan, found.n_outside) == (512, 1, 0)
        assert np.isinf(found.values.values[1, 1, 1]) and found.pass_percent == pytest.approx(100 * 511 / 512)
    cut = gamma_index(dose, dose.isel(x=slice(2, 8)), CRITERIA[0])
    assert cut.n_outside == 2 * 64 and cut.pass_percent == 75
    empty = gamma_index(dose, dose, Criterion(3, 3, of=1000.0))
    assert empty.n_compared == 0 and np.isnan(empty.pass_percent)


@pytest.mark.parametrize("criterion", [CRITERIA[2], Criterion(2, 2, local=True), Criterion(3, 3, fraction=7)])
def test_torch_says_the_same(criterion, monkeypatch):
    reference, evaluated = _random((12, 14, 13), (4.0, 3.0, 2.0), 0), _random((12, 14, 13), (4.0, 3.0, 2.0), 0)
    evaluated = evaluated.copy(data=np.roll(evaluated.values, 1, 2) + 0.1 * _random((12, 14, 13), 4.0, 1).values)
    ours = gamma_index(reference, evaluated, criterion)
    points = np.flatnonzero(np.isfinite(ours.values.values))
    there = [i.astype(float) for i in np.unravel_index(points, reference.shape)]
    steps = criterion.distance_mm / criterion.fraction / np.array([4.0, 3.0, 2.0])
    other = _gamma_torch(reference.values, evaluated.values, points, there, steps, criterion, float(reference.max()), "cpu")
    np.testing.assert_allclose(other, ours.values.values.ravel()[points], atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_cuda_says_the_same():
    reference, evaluated = _random((24, 30, 28), 3.0, 0), _random((24, 30, 28), 3.0, 2)
    cpu, cuda = (gamma_index(reference, evaluated, CRITERIA[2], device=d) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda.values.values, cpu.values.values, atol=1e-3)


def test_pymedphys_agrees():
    pymedphys = pytest.importorskip("pymedphys", reason="pymedphys is only there on Python below 3.13")
    reference = _random((24, 21, 28), 4.0, 0, smooth=3.0)
    evaluated = reference.copy(data=0.95 * reference.values + 0.05 * _random((24, 21, 28), 4.0, 5, smooth=3.0).values)
    evaluated = evaluated.copy(data=ndimage.shift(evaluated.values, (0.3, -0.2, 0.25), order=1, mode="nearest"))
    axes = tuple(reference[a].values for a in AXES)
    for criterion in (*CRITERIA, replace(CRITERIA[0], local=True)):
        ours = gamma_index(reference, evaluated, criterion)
        theirs = pymedphys.gamma(axes, reference.values, axes, evaluated.values, criterion.percent, criterion.distance_mm, interp_fraction=10,
                                 lower_percent_dose_cutoff=10, max_gamma=2, local_gamma=criterion.local, quiet=True)
        there = np.isfinite(theirs)
        assert np.array_equal(there, np.isfinite(ours.values.values))
        assert abs(ours.values.values[there] - theirs[there]).mean() < 0.01
        assert abs(100 * (theirs[there] <= 1).mean() - ours.pass_percent) < 0.5  # a few points on the edge of so few


def test_bad_input_says_what_to_do():
    dose = _random((6, 6, 6), 2.0, 0)
    with pytest.raises(ValueError, match="3%/2mm"):
        Criterion(0, 2)
    with pytest.raises(ValueError, match="cap above 1"):
        Criterion(3, 3, cap=1.0)
    with pytest.raises(ValueError, match="local without of"):
        Criterion(3, 3, local=True, of=60.0)
    with pytest.raises(ValueError, match="expected 'Gy'"):
        gamma_index(dose, dose.assign_attrs(units="HU"), CRITERIA[0])
    with pytest.raises(ValueError, match="add 1000"):
        gamma_index(dose * 0 - 5, dose * 0 - 5, CRITERIA[0])
    with pytest.raises(ValueError, match="two voxels"):
        gamma_index(dose.isel(z=[0]), dose, CRITERIA[0])
