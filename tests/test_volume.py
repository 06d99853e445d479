"""Volumes: orientation and spacing, files, resampling, cropping, rigid movement and tensors, against closed forms."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from radrepro.core.volume import (
    AXES,
    centred_grid,
    check,
    crop_or_pad,
    from_tensor,
    like,
    move,
    read_nifti,
    read_zarr,
    resample,
    rigid,
    spacing_mm,
    to_tensor,
    volume,
    write_nifti,
    write_zarr,
)

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SIXTEENTHS = st.integers(8, 80).map(lambda n: n / 16)  # steps that float32 holds exactly
ORIGINS = st.integers(-4000, 4000).map(lambda n: n / 16)
ANGLES = st.tuples(*[st.floats(-180, 180)] * 3)
quick = settings(max_examples=25, deadline=None)


@st.composite
def volumes(draw, dtype=np.float32, least=2, most=6, steps=SIXTEENTHS):
    """A Volume of any small shape, anisotropic spacing and origin, with values by seed."""
    shape = draw(st.tuples(*[st.integers(least, most)] * 3))
    coords = {a: draw(ORIGINS) + draw(steps) * np.arange(n) for a, n in zip(AXES, shape)}
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 200, shape).astype(dtype)
    return volume(values, **coords, units="HU")


def plane(z, y, x, slope=(3.0, -2.0, 0.5), at_zero=7.0):
    """A linear function of the place in mm, (Z, Y, X)."""
    z, y, x = np.meshgrid(z, y, x, indexing="ij")
    return slope[0] * z + slope[1] * y + slope[2] * x + at_zero


def on(v):
    return {a: v[a].values for a in AXES}


def blob(grid, centre_xyz_mm, sigma_mm=6.0):
    z, y, x = np.meshgrid(*(grid[a] for a in AXES), indexing="ij")
    d2 = sum((c - m) ** 2 for c, m in zip((x, y, z), centre_xyz_mm))
    return volume(np.exp(-d2 / (2 * sigma_mm**2)).astype(np.float32), **grid, units="1")


def centroid_xyz_mm(v):
    return np.array([float((v * v[a]).sum() / v.sum()) for a in "xyz"])


# --- NIfTI: orientation and spacing


def stored(path, order, signs, *, step_xyz=(0.75, 1.25, 2.5), shape_xyz=(3, 4, 5), first_xyz=(-31.0, 12.5, -205.0)):
    """Write, by nibabel alone, a file whose voxel axis i runs along patient axis order[i] with signs[i].

    Its value at each voxel is a linear code of that voxel's own LPS place, which the affine gives."""
    lps = np.eye(4)
    lps[:3, :3] = 0
    for i, (patient, sign) in enumerate(zip(order, signs)):
        lps[patient, i] = sign * step_xyz[patient]
    lps[:3, 3] = first_xyz
    shape = tuple(shape_xyz[p] for p in order)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    place = index @ lps[:3, :3].T + lps[:3, 3]
    values = (place @ [8.0, 64.0, 512.0]).astype(np.float32)  # exact: all places are multiples of 1/4
    nibabel.save(nibabel.Nifti1Image(values, RAS_TO_LPS @ lps), path)
    return place


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
def test_every_orientation_reads_as_the_same_place(tmp_path, order, signs):
    place = stored(tmp_path / "a.nii.gz", order, signs)
    v = read_nifti(tmp_path / "a.nii.gz")
    assert v.dims == AXES and v.shape == (5, 4, 3) and spacing_mm(v) == (2.5, 1.25, 0.75)
    assert v.values.flags.c_contiguous and v.attrs["units"] == "HU"
    for i, a in enumerate("xyz"):
        np.testing.assert_array_equal(v[a], np.unique(place[..., i]))  # ascending, LPS
    np.testing.assert_array_equal(v, plane(**on(v), slope=(512, 64, 8), at_zero=0))


def test_lps_is_left_posterior_superior(tmp_path):
    """A file's RAS (-30, 20, 10) is on the left, in front and above: (30, -20, 10) in LPS."""
    values = np.zeros((9, 9, 9), np.int16)
    values[8, 7, 6] = 1
    nibabel.save(
        nibabel.Nifti1Image(values, np.array([[-10.0, 0, 0, 50], [0, 10, 0, -50], [0, 0, 10, -50], [0, 0, 0, 1]])),
        tmp_path / "a.nii",
    )  # that voxel lies at RAS (-30, 20, 10)
    v = read_nifti(tmp_path / "a.nii")
    np.testing.assert_allclose(centroid_xyz_mm(v), [30, -20, 10])


@pytest.mark.parametrize(
    "angle_deg",
    [
        1.0,
        10.0,
        45.0,
        -30.0,
        pytest.param(
            0.5
        ),
    ],
)
@pytest.mark.parametrize("axis", range(3))
def test_a_tilted_file_is_refused(tmp_path, angle_deg, axis):
    turn = rigid((0, 0, 0), np.eye(3)[axis] * angle_deg)
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), turn @ np.diag([1.0, 2, 3, 1])), tmp_path / "oblique.nii"
    )
    with pytest.raises(ValueError, match="oblique.nii: expected axes parallel"):
        read_nifti(tmp_path / "oblique.nii")


def test_slope_and_intercept_of_the_file_are_applied(tmp_path):
    image = nibabel.Nifti1Image(np.arange(-1000.0, 1400.0, 100.0).reshape(2, 3, 4), np.eye(4))
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    assert nibabel.load(tmp_path / "scaled.nii.gz").dataobj.slope != 1
    v = read_nifti(tmp_path / "scaled.nii.gz")
    assert float(v.min()) == pytest.approx(-1000, abs=0.1) and float(v.max()) == pytest.approx(1300, abs=0.1)


# --- files: round trips


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_nifti_round_trip_is_exact(tmp_path_factory, dtype, data):
    v = data.draw(volumes(dtype))
    path = write_nifti(v, tmp_path_factory.mktemp("n") / "new" / "v.nii")
    again = read_nifti(path)
    assert again.dtype == dtype and again.identical(v)
    step, first = spacing_mm(v), {a: float(v[a][0]) for a in AXES}
    affine = np.diag([-step[2], -step[1], step[0], 1])
    affine[:3, 3] = -first["x"], -first["y"], first["z"]
    np.testing.assert_array_equal(nibabel.load(path).affine, affine)


def test_flags_and_counts_have_a_nifti_type(tmp_path):
    grid = centred_grid((2, 3, 4), 2.0)
    values = np.arange(24).reshape(2, 3, 4)
    for given_type, stored_type in ((bool, np.uint8), (np.int64, np.int32)):
        again = read_nifti(
            write_nifti(volume(values.astype(given_type), **grid, units="1"), tmp_path / "a.nii"), units="1"
        )
        assert again.dtype == stored_type and again.attrs["units"] == "1"
        np.testing.assert_array_equal(again, values.astype(given_type))


@quick
@given(v=volumes(steps=st.floats(0.3, 9)))
def test_any_spacing_survives_nifti_to_float32(tmp_path_factory, v):
    folder = tmp_path_factory.mktemp("n")
    once = read_nifti(write_nifti(v, folder / "1.nii"))
    twice = read_nifti(write_nifti(once, folder / "2.nii"))
    for a in AXES:
        np.testing.assert_allclose(once[a], v[a], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(nibabel.load(folder / "1.nii").affine, nibabel.load(folder / "2.nii").affine)
    np.testing.assert_array_equal(twice, once)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64])
def test_zarr_round_trip_is_exact(tmp_path, dtype):
    rng = np.random.default_rng(1)
    grid = {"z": -3.1 + 0.3 * np.arange(4), "y": 7 / 3 * np.arange(5), "x": 1e-3 + 0.7 * np.arange(6)}
    v = volume(rng.integers(0, 2 if dtype is bool else 100, (4, 5, 6)).astype(dtype), **grid, units="HU")
    again = read_zarr(write_zarr(v, tmp_path / "v.zarr"))
    assert again.identical(v) and again.dtype == dtype and again.name is None
    assert read_zarr(write_zarr(v.isel(z=slice(2)), tmp_path / "v.zarr")).identical(v.isel(z=slice(2)))  # written over


def test_zarr_is_read_by_the_process_that_asks(tmp_path):
    """Not as a dask array: inside a worker that would be put to the cluster's queue, behind what the other workers do."""
    import dask

    def queued(*args, **kwargs):
        raise AssertionError("expected the file to be read here, got a task for dask")

    v = volume(np.zeros((3, 4, 5)), **centred_grid((3, 4, 5), 1.0), units="HU")
    with dask.config.set(scheduler=queued):
        assert read_zarr(write_zarr(v, tmp_path / "v.zarr")).identical(v)


def test_zarr_keeps_fields_and_holes(tmp_path):
    field = volume(
        np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32),
        **centred_grid((4, 5, 6), 0.7),
        units="mm",
    )
    again = read_zarr(write_zarr(field, tmp_path / "f.zarr"))
    assert again.identical(field) and list(again["vector"].values) == ["z", "y", "x"]
    hole = field.where(field > 0)
    assert read_zarr(write_zarr(hole, tmp_path / "h.zarr")).equals(hole)


def test_missing_files_say_where(tmp_path):
    for read, words in ((read_nifti, "a NIfTI file at"), (read_zarr, "a zarr store at")):
        with pytest.raises(FileNotFoundError, match=f"expected {words} .*none, found none: "):
            read(tmp_path / "none")


# --- resample


@quick
@given(v=volumes(), seed=st.integers(0, 99))
def test_linear_functions_resample_exactly(v, seed):
    v = v.copy(data=plane(**on(v)).astype(np.float32))
    rng = np.random.default_rng(seed)
    step = {a: s * rng.uniform(0.2, 0.5) for a, s in zip(AXES, spacing_mm(v))}
    to = {a: v[a].values[0] + step[a] * (rng.uniform() + np.arange(2)) for a in AXES}
    out = resample(v, to, fill=np.nan)
    np.testing.assert_allclose(out, plane(**to), rtol=1e-5, atol=2e-2)
    for a in AXES:
        np.testing.assert_array_equal(out[a], to[a])


@pytest.mark.parametrize("order", [0, 1, 3])
@settings(max_examples=10, deadline=None)
@given(v=volumes(steps=st.floats(0.3, 9)))
def test_resample_onto_itself_changes_nothing(order, v):
    out = resample(v, v, fill=np.nan if order else 9, order=order)
    np.testing.assert_allclose(out, v, atol=1e-3 if order else 0)
    assert out.attrs == v.attrs and all((out[a] == v[a]).all() for a in AXES)


@quick
@given(v=volumes(np.uint8), seed=st.integers(0, 99))
def test_labels_take_the_nearest_voxel(v, seed):
    rng = np.random.default_rng(seed)
    to = {a: np.sort(rng.uniform(v[a].values[0], v[a].values[-1], 2)) for a in AXES}
    out = resample(v, to, fill=0, order=0)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, v.sel(**to, method="nearest"))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("end, outwards", [(0, -1), (-1, 1)])
def test_half_a_voxel_beyond_the_border_is_still_inside(axis, end, outwards):
    v = volume(
        np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32),
        z=[0, 3, 6, 9],
        y=2.0 * np.arange(5),
        x=0.5 * np.arange(6),
        units="HU",
    )
    s, border = spacing_mm(v)[AXES.index(axis)], float(v[axis][end])
    for voxels, inside in ((0.0, True), (0.25, True), (0.5, True), (0.51, False), (3.0, False)):
        out = resample(v, on(v) | {axis: np.array([border + outwards * voxels * s])}, fill=-77)
        wanted = v.isel({axis: [end]}).values if inside else np.full(out.shape, -77)
        np.testing.assert_allclose(out.values, wanted, atol=1e-6)


def test_fields_keep_their_mm_and_order():
    grid, finer = centred_grid((4, 4, 4), 6.0), centred_grid((6, 6, 6), 3.0)
    field = volume(np.stack([plane(**grid, slope=s) for s in np.eye(3)]), **grid, units="mm")
    out = resample(field, finer, fill=0)
    assert out.attrs["units"] == "mm"
    np.testing.assert_allclose(out, np.stack([plane(**finer, slope=s) for s in np.eye(3)]), atol=1e-5)


# --- crop_or_pad


@quick
@given(v=volumes(), shape=st.tuples(*[st.integers(2, 10)] * 3))
def test_crop_or_pad_moves_no_voxel(v, shape):
    v = v.copy(data=plane(**on(v)))
    out = crop_or_pad(v, shape, fill=-1e6)
    assert out.shape == shape
    kept = np.ones(shape, bool)
    for i, a in enumerate(AXES):
        had = np.isin(out[a], v[a])  # steps of 1/16: coordinates stay exact
        kept &= had.reshape([-1 if j == i else 1 for j in range(3)])
        assert had.sum() == min(shape[i], v.sizes[a])
        low, high = (abs(float(out[a][k] - v[a][k])) for k in (0, -1))
        assert 0 <= high - low <= spacing_mm(v)[i] + 1e-9  # an odd voxel: at the upper end
    np.testing.assert_array_equal(out.values[kept], plane(**on(out))[kept])
    assert (out.values[~kept] == -1e6).all()


@quick
@given(v=volumes(), more=st.tuples(*[st.integers(0, 5)] * 3))
def test_padding_is_undone_by_cropping(v, more):
    grown = crop_or_pad(v, tuple(n + m for n, m in zip(v.shape, more)), fill=0)
    assert crop_or_pad(grown, v.shape, fill=0).identical(v)


def test_a_field_is_cropped_in_space_only():
    field = volume(np.random.default_rng(0).normal(size=(3, 5, 5, 5)), **centred_grid((5, 5, 5), 2.0), units="mm")
    out = crop_or_pad(field, (3, 7, 5), fill=0.0)
    assert out.shape == (3, 3, 7, 5)
    np.testing.assert_array_equal(out.values[:, :, 1:6], field.values[:, 1:4])


# --- rigid and move


@quick
@given(angle_deg=ANGLES, translation_mm=st.tuples(*[st.floats(-50, 50)] * 3))
def test_rigid_turns_about_x_then_y_then_z_then_translates(angle_deg, translation_mm):
    m = rigid(translation_mm, angle_deg)
    np.testing.assert_allclose(m[:3, :3], Rotation.from_euler("xyz", angle_deg, degrees=True).as_matrix(), atol=1e-12)
    np.testing.assert_array_equal(m[:, 3], [*translation_mm, 1])
    np.testing.assert_array_equal(m[3], [0, 0, 0, 1])
    x, y, z = (rigid((0, 0, 0), angle_deg * e) for e in np.eye(3))
    np.testing.assert_allclose(m, rigid(translation_mm) @ z @ y @ x, atol=1e-12)


@pytest.mark.parametrize(
    "axis, start, end", [(0, (0, 1, 0), (0, 0, 1)), (1, (0, 0, 1), (1, 0, 0)), (2, (1, 0, 0), (0, 1, 0))]
)
def test_rotations_are_right_handed(axis, start, end):
    """About +z (up) by 90 degrees, the left side goes to the back: left x back = up."""
    m = rigid((0, 0, 0), 90 * np.eye(3)[axis])
    np.testing.assert_allclose(m[:3, :3] @ start, end, atol=1e-12)
    grid = {"z": np.arange(-40, 41, 4.0), "y": np.arange(-40, 41, 5.0), "x": np.arange(-40, 41, 2.5)}
    moved = move(blob(grid, 20 * np.array(start)), m, fill=0)
    np.testing.assert_allclose(centroid_xyz_mm(moved), 20 * np.array(end), atol=0.15)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1, -1])
def test_a_positive_translation_goes_left_back_and_up(axis, sign):
    grid = {"z": np.arange(-40, 41, 4.0), "y": np.arange(-40, 41, 5.0), "x": np.arange(-40, 41, 2.5)}
    shift_mm = 7.3 * sign * np.eye(3)[axis]
    np.testing.assert_allclose(
        centroid_xyz_mm(move(blob(grid, (1, -2, 3)), rigid(shift_mm), fill=0)),
        np.array([1, -2, 3]) + shift_mm,
        atol=0.05,
    )


@settings(max_examples=12, deadline=None)
# so far inside that the blob is not cut by the smaller grid
@given(centre=st.tuples(*[st.floats(-8, 8)] * 3), angle_deg=ANGLES, shift=st.tuples(*[st.floats(-5, 5)] * 3))
def test_content_goes_where_the_matrix_says(centre, angle_deg, shift):
    grid, m = centred_grid((29, 22, 35), (3.0, 4.0, 2.5)), rigid(shift, angle_deg)
    elsewhere = {a: c[3:-3] + 1.3 for a, c in grid.items()}
    for to in (None, elsewhere):
        moved = move(blob(grid, centre), m, fill=0, to=to)
        np.testing.assert_allclose(centroid_xyz_mm(moved), (m @ [*centre, 1])[:3], atol=0.3)
    there_and_back = move(move(blob(grid, centre), m, fill=0), np.linalg.inv(m), fill=0)
    np.testing.assert_allclose(centroid_xyz_mm(there_and_back), centre, atol=0.3)


def test_two_moves_are_one():
    grid = centred_grid((29, 22, 35), (3.0, 4.0, 2.5))
    a, b = rigid((3, -4, 5), (20, 0, 0)), rigid((-2, 1, 0), (0, 0, -35))
    v = blob(grid, (8, 5, -6), sigma_mm=9)
    both, one = move(move(v, a, fill=0, order=3), b, fill=0, order=3), move(v, b @ a, fill=0, order=3)
    assert float(abs(both - one).max()) < 0.01 < float(abs(move(v, a @ b, fill=0, order=3) - one).max())


def whole_voxels(v, voxels_zyx):
    m = rigid([k * s for k, s in zip(voxels_zyx, spacing_mm(v))][::-1])
    moved = move(v, m, fill=-5)
    wanted = np.pad(v.values, [(abs(k), abs(k)) for k in voxels_zyx], constant_values=-5)
    wanted = wanted[tuple(slice(abs(k) - k, abs(k) - k + n) for k, n in zip(voxels_zyx, v.shape))]
    np.testing.assert_allclose(moved, wanted, atol=1e-3)


@quick
@given(v=volumes(), voxels=st.tuples(*[st.integers(-3, 3)] * 3))
def test_whole_voxels_move_exactly(v, voxels):
    v = v.assign_coords({a: s * np.arange(v.sizes[a]) for a, s in zip(AXES, (4.0, 0.5, 2.0))})
    whole_voxels(v, voxels)


@pytest.mark.parametrize("step_mm", [0.7, 0.9766, 1.1, 3.906, 5.7])
def test_whole_voxels_move_exactly_at_any_spacing(step_mm):
    v = volume(np.random.default_rng(0).normal(size=(6, 7, 8)), **centred_grid((6, 7, 8), step_mm), units="HU")
    for voxels in ((0, 0, 0), (0, 0, 1), (0, -2, 0), (3, 1, -1)):
        whole_voxels(v, voxels)


def test_nearest_keeps_labels():
    v = volume(
        np.random.default_rng(0).integers(0, 9, (8, 8, 8)).astype(np.uint8), **centred_grid((8, 8, 8), 4.0), units="1"
    )
    moved = move(v, rigid((1, 2, 3), (5, 5, 5)), fill=0, order=0)
    assert moved.dtype == np.uint8 and set(np.unique(moved)) <= set(range(9))


# --- check


def test_check_returns_the_volume_itself():
    v = volume(np.zeros((2, 3, 4)), **centred_grid((2, 3, 4), 1.0), units="HU")
    assert check(v, units="HU", name="ct") is v


def spoilt(**coords):
    grid = centred_grid((3, 3, 3), 2.0) | {a: np.asarray(c, float) for a, c in coords.items()}
    return xr.DataArray(np.zeros([len(grid[a]) for a in AXES]), coords=grid, dims=AXES, attrs={"units": "HU"})


HOLE = spoilt()
HOLE = HOLE.where((HOLE.x != 0) | (HOLE.y != 0))


@pytest.mark.parametrize(
    "v, error, words",
    [
        (np.zeros((2, 2, 2)), TypeError, r"ct: expected a Volume .* got ndarray: make one with"),
        (
            spoilt().transpose("x", "y", "z"),
            ValueError,
            r"ct: expected dims \('z', 'y', 'x'\), got \('x', 'y', 'z'\): transpose",
        ),
        (spoilt().isel(z=0), ValueError, r"ct: expected dims .*, got \('y', 'x'\): "),
        (
            spoilt(z=[4, 2, 0]),
            ValueError,
            "ct: expected ascending, evenly spaced z in mm, got steps from -2 to -2: flip",
        ),
        (spoilt(y=[0, 2, 5]), ValueError, "evenly spaced y in mm, got steps from 2 to 3: .*resample"),
        (spoilt(x=[1, 1, 1]), ValueError, "evenly spaced x in mm, got steps from 0 to 0"),
        (spoilt().assign_attrs(units="Gy"), ValueError, "ct is in 'Gy', expected 'HU': convert it"),
        (spoilt().assign_attrs({"units": None}), ValueError, "ct is in None, expected 'HU'"),
        (HOLE, ValueError, "ct: expected finite numbers, got 3 NaN or infinite voxels: fill them"),
        (xr.full_like(spoilt(), -np.inf), ValueError, "expected finite numbers, got 27 NaN"),
    ],
)
def test_check_says_expected_got_and_remedy(v, error, words):
    with pytest.raises(error, match=words):
        check(v, units="HU", name="ct")


@pytest.mark.parametrize(
    "v",
    [
        spoilt(z=[0, np.nan, 4]),
        xr.DataArray(np.zeros((2, 2, 2)), dims=AXES, attrs={"units": "HU"}),
        xr.DataArray(
            np.zeros((3, 2, 2, 2)),
            dims=("vector", *AXES),
            attrs={"units": "HU"},
            coords={"vector": ["x", "y", "z"]} | centred_grid((2, 2, 2), 1.0),
        ),
    ],
    ids=["nan", "no coordinates", "x, y, z"],
)
def test_check_sees_the_coordinates_themselves(v):
    with pytest.raises(ValueError, match="expected"):
        check(v, units="HU", name="ct")


def test_holes_and_uneven_steps_within_tolerance_may_pass():
    assert check(HOLE, finite=False) is HOLE
    check(spoilt(x=[0, 2, 4.001]), units="HU")  # half a per mille: how files round


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 4, 5),
        (4, 3, 2),
        (2, 2, 3, 4),
        pytest.param(
            (3, 4)
        ),
    ],
)
def test_values_must_fit_their_coordinates(shape):
    with pytest.raises(ValueError, match=r"expected values of shape .* got .*: pass \(Z, Y, X\)"):
        volume(np.zeros(shape), **centred_grid((2, 3, 4), 1.0), units="HU")


def test_grids_are_centred_and_like_keeps_units():
    grid = centred_grid((4, 5, 6), (1.0, 2.0, 3.0))
    assert {a: (len(c), c.mean(), np.diff(c).max()) for a, c in grid.items()} == {
        "z": (4, 0, 1),
        "y": (5, 0, 2),
        "x": (6, 0, 3),
    }
    v = volume(np.zeros((4, 5, 6)), **grid, units="Gy")
    assert (
        spacing_mm(v) == (1, 2, 3)
        and like(v.values, v).attrs["units"] == "Gy"
        and like(v.values, v, "HU").attrs["units"] == "HU"
    )


# --- tensors


@pytest.mark.parametrize("dtype", [bool, np.int16, ">i2", np.float32, np.float64])
def test_tensors_keep_order_and_values(dtype):
    v = volume((np.arange(24).reshape(2, 3, 4) % 5).astype(dtype), **centred_grid((2, 3, 4), 1.0), units="HU")
    t = to_tensor(v)
    assert t.shape == (1, 1, 2, 3, 4) and t.dtype == torch.float32
    assert float(t[0, 0, 1, 2, 3]) == float(v.values[1, 2, 3])
    back = from_tensor(t.requires_grad_(), v)
    assert back.attrs["units"] == "HU" and back.astype(np.dtype(dtype)).equals(v)


def test_field_tensors_have_three_components():
    field = volume(np.arange(72.0).reshape(3, 2, 3, 4), **centred_grid((2, 3, 4), 1.0), units="mm")
    t = to_tensor(field)
    assert t.shape == (1, 3, 2, 3, 4) and from_tensor(t, field).equals(field)
    assert from_tensor(t[:, :1], field, "1/mm").attrs["units"] == "1/mm"


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 3, 4), (2, 1, 2, 3, 4), (1, 2, 2, 3, 4)])
def test_from_tensor_takes_one_sample(shape):
    v = volume(np.zeros((2, 3, 4)), **centred_grid((2, 3, 4), 1.0), units="HU")
    with pytest.raises(ValueError, match=r"expected a tensor \(1, 1 or 3, Z, Y, X\), got .*: pass one sample"):
        from_tensor(torch.zeros(shape), v)
