"""metrics.image and metrics.motion: known answers and invariants."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from radrepro.core.volume import centred_grid, volume
from radrepro.core.warp import jacobian_determinant
from radrepro.metrics.image import cdvh, dilate_mask, hu_at_volume, mae_hu, ms_ssim, ms_ssim_scales, mse, paired_values
from radrepro.metrics.motion import dice, dice_buckets, folding_count, tre_mm

GRID = centred_grid((6, 8, 10), (4.0, 2.0, 1.0))
Z, Y, X = np.meshgrid(*GRID.values(), indexing="ij")
pictures = arrays(np.float32, (4, 5, 6), elements=st.floats(-1000, 3000, width=32))


def ct(values) -> object:
    return volume(np.broadcast_to(np.asarray(values, np.float32), Z.shape).copy(), **GRID, units="HU")


@given(pictures, pictures)
@settings(max_examples=30, deadline=None)
def test_errors_are_symmetric_and_ordered(a, b):
    assert mae_hu(a, b) == pytest.approx(mae_hu(b, a)) and mae_hu(a, a) == 0 and mse(a, a) == 0
    assert mae_hu(a, b) ** 2 <= mse(a, b) * (1 + 1e-4) + 1e-6  # Jensen
    levels = np.array([0, 1, 10, 100, 4000.0])
    curve = cdvh(a, b, levels_hu=levels)
    assert (np.diff(curve) <= 0).all() and curve[-1] == 0 and ((0 <= curve) & (curve <= 100)).all()
    exceeded = hu_at_volume(a, b, volume_percent=25)
    assert cdvh(a, b, levels_hu=[exceeded * (1 + 1e-5) + 1e-3])[0] <= 25 + 1e-9


def test_masks_choose_the_voxels():
    a, b = ct(0), ct(np.where(X > 0, 40.0, 0.0))
    assert (mae_hu(a, b), mae_hu(a, b, X > 0), mae_hu(a, b, X < 0)) == (20, 40, 0)
    assert mse(a, b, volume(X > 0, **GRID, units="1")) == 1600
    assert cdvh(a, b, X > 0, levels_hu=[39.9, 40.0]).tolist() == [100, 0]


def test_a_wrong_grid_is_never_aligned_silently():
    a = ct(0)
    with pytest.raises(ValueError, match="one grid"):
        mae_hu(a, a[1:])
    with pytest.raises(ValueError, match="one grid"):
        mse(a, a.assign_coords(z=a.z + 4.0))
    with pytest.raises(ValueError, match="one grid"):
        paired_values(a, a, volume(X > 0, **centred_grid((6, 8, 10), 1.0), units="1"))
    with pytest.raises(ValueError, match="one shape"):
        mse(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)))
    with pytest.raises(ValueError, match="empty"):
        mse(a, a, X > 1e9)
    with pytest.raises(ValueError, match="finite"):
        mae_hu(a, a.where(X > 0))
    with pytest.raises(ValueError, match="expected 'HU'"):
        mae_hu(a, volume(a.values, **GRID, units="1"))
    with pytest.raises(ValueError, match="volume_percent"):
        hu_at_volume(a, a, volume_percent=0)
    assert mae_hu(a, a.where(X > 0), X > 0) == 0  # NaN outside of the mask do no harm


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=4),
       st.floats(0, 9))
@settings(max_examples=30, deadline=None)
def test_a_dilated_mask_reaches_as_far_as_it_says(seeds, radius_mm):
    mask = np.zeros(Z.shape, bool)
    for s in seeds:
        mask[s] = True
    grown = dilate_mask(volume(mask, **GRID, units="1"), radius_mm).values
    points = np.stack([Z, Y, X], -1)
    nearest_mm = np.min([np.linalg.norm(points - points[s], axis=-1) for s in seeds], axis=0)
    close_call = np.abs(nearest_mm - radius_mm) < 1e-3
    assert ((grown == (nearest_mm <= radius_mm)) | close_call).all()


def test_ms_ssim():
    rng = np.random.default_rng(0)
    a = rng.random((24, 26, 28)).astype(np.float32)
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1).astype(np.float32)
    for scales in (1, 2, 3):
        assert ms_ssim(a, a, scales=scales) == pytest.approx(1, abs=1e-6)
        assert ms_ssim(a, b, scales=scales) == pytest.approx(ms_ssim(b, a, scales=scales), abs=1e-6)
        assert 0 < ms_ssim(a, b, scales=scales) < 1
    # the order of the axes and where the numbers live do not matter
    two = ms_ssim(a, b, scales=2)
    assert ms_ssim(a.transpose(2, 0, 1), b.transpose(2, 0, 1), scales=2) == pytest.approx(two, abs=1e-4)
    assert ms_ssim(torch.from_numpy(a), torch.from_numpy(b), scales=2) == pytest.approx(two)
    with pytest.raises(ValueError, match="ask ms_ssim_scales"):
        ms_ssim(a, b, scales=5)
    with pytest.raises(ValueError, match="0..1"):
        ms_ssim(a * 100, b, scales=2)
    with pytest.raises(ValueError, match="one sample"):
        ms_ssim(a[None], b[None], scales=2)


@pytest.mark.parametrize("kernel", [3, 5, 7, 11])
@pytest.mark.parametrize("side", [12, 20, 33, 47])
def test_the_largest_number_of_scales_runs_and_kernel_is_what_it_says(side, kernel):
    picture = np.random.default_rng(1).random((side, side + 1, side)).astype(np.float32)
    scales = ms_ssim_scales(picture.shape, kernel)
    assert ms_ssim(picture, picture, scales=scales, kernel=kernel) == pytest.approx(1, abs=1e-5)


def test_too_small_for_one_scale():
    with pytest.raises(ValueError, match="smaller kernel"):
        ms_ssim_scales((4, 64, 64), 5)


def test_folding():
    u = torch.zeros(2, 3, 6, 6, 6)
    assert folding_count(jacobian_determinant(u, (1, 1, 1))).count == 0
    assert folding_count(np.array([[1.0, 0.0], [-1.0, 2.0]])) == (2, 50.0)  # zero counts
    with pytest.raises(ValueError, match="finite"):
        folding_count(np.array([np.nan, 1.0]))


@given(arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 3)), arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 3)))
@settings(max_examples=30, deadline=None)
def test_dice_is_a_symmetric_share(a, b):
    for label, value in zip((1, 2, 3), dice_buckets(a, b, {1: "one", 2: "two", 3: "three"}).values()):
        if not ((a == label) | (b == label)).any():
            assert np.isnan(value)
            continue
        assert 0 <= value <= 1 and value == dice(b, a, label)
        assert (value == 1) == np.array_equal(a == label, b == label)


def test_dice_by_hand():
    assert dice(np.array([[[1, 1, 0, 0]]]), np.array([[[0, 1, 1, 1]]])) == 2 * 1 / (2 + 3)


def test_landmarks():
    field = volume(np.stack([0.1 * Z, 0.2 * Y, -0.1 * X]), **GRID, units="mm")
    p = np.array([[5.0, -3.0, 2.0], [-1.0, 1.5, -3.5]])
    q = p + p * [0.1, 0.2, -0.1]
    np.testing.assert_allclose(tre_mm(p, q, field), 0, atol=1e-6)
    np.testing.assert_allclose(tre_mm(p, q + [0, 3, 4], field), 5, atol=1e-6)
    np.testing.assert_allclose(tre_mm([0, 0, 0], [3, 0, 4]), [5])
    with pytest.raises(ValueError, match="outside"):
        tre_mm([[100.0, 0, 0]], [[0.0, 0, 0]], field)
    with pytest.raises(ValueError, match="pair them"):
        tre_mm(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="expected a field"):
        tre_mm(p, q, volume(Z, **GRID, units="mm"))
