"""Head-and-neck patients: analytic shapes, what a day changes, registration, projection and real CTs."""
import json
import tracemalloc

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from radrepro.core.project import KVPhysics, kv_geometry, kv_pair
from radrepro.core.volume import centred_grid, like, move, rigid, spacing_mm, volume, write_nifti
from radrepro.data.headneck import find_headneck, phantom_patient, real_patient
from radrepro.data.headneck_anatomy import STRUCTURES, render
from radrepro.data.headneck_day import Day, day_field, draw_anatomy, draw_day
from radrepro.data.headneck_masks import best_named, read_structures, structure_name
from radrepro.data.headneck_session import SetUp, acquire, planning_grid, reproject
from radrepro.data.headneck_shapes import Canvas, bar_distance, pull_back
from radrepro.data.manifests import read_claims

COARSE = centred_grid((48, 42, 56), 8.0)


@pytest.fixture(scope="module")
def patient():
    return phantom_patient(3, voxel_mm=8)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.floats(-40, 40)] * 3), st.tuples(*[st.floats(-40, 40)] * 3), st.floats(3, 20), st.integers(0, 99))
def test_round_bars_have_exact_distances(a, b, radius, seed):
    """A round bar is a capsule: its distance is that of the nearest point of the line, less the radius."""
    p = np.random.default_rng(seed).uniform(-80, 80, (3, 50)).astype(np.float32)
    a, b = np.float32(a), np.float32(b)
    along = b - a
    t = np.clip((p.T - a) @ along / max(float(along @ along), 1e-9), 0, 1)
    exact = np.linalg.norm(p.T - a - t[:, None] * along, axis=1) - radius
    np.testing.assert_allclose(bar_distance(*p, a, b, (radius,) * 3), exact, atol=0.05)


@pytest.mark.parametrize("voxel_mm", [2.0, 5.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_soft_edges_keep_volume_and_follow_a_small_shift(voxel_mm, axis):
    c = np.arange(-40, 41, voxel_mm, dtype=np.float32)
    z, y, x = np.meshgrid(c, c, c, indexing="ij")
    centre, covers = np.zeros(3), []
    for shift in (0.0, 0.3):
        centre[axis] = shift
        canvas = Canvas(x, y, z, edge_mm=voxel_mm)
        canvas.paint(*canvas.distance(centre, centre, (25, 18, 22)), 0.0)
        covers.append((canvas.hu + 1000) / 1000)
    mass = covers[0].sum() * voxel_mm**3
    assert abs(mass / (4 / 3 * np.pi * 25 * 18 * 22) - 1) < 0.02
    moments = [float((w * (x, y, z)[axis]).sum() / w.sum()) for w in covers]
    assert abs(moments[1] - moments[0] - 0.3) < 0.03


def test_pull_back_reads_the_components_in_order():
    axis = np.array([-100.0, 0.0, 100.0])
    knots = xr.DataArray(np.stack([np.full((3, 3, 3), s, np.float32) for s in (3, 2, 1)]), attrs={"units": "mm"},
                         dims=("vector", "z", "y", "x"), coords={"vector": list("zyx"), **{a: axis for a in "zyx"}})
    assert np.allclose(pull_back(*np.zeros((3, 1), np.float32), knots), [[1], [2], [3]])


def test_the_skull_stays_and_the_neck_bends():
    field = day_field(Day(flexion_deg=3, bend_deg=2))
    assert not field.sel(z=slice(0, None)).any()
    low = field.sel(z=-180, y=15, x=0)
    arm = 180 - 15
    assert abs(float(low.sel(vector="y")) - np.deg2rad(3) * arm) < 0.2
    assert abs(float(low.sel(vector="x")) + np.deg2rad(2) * arm) < 0.2


def test_same_person_at_every_resolution():
    who, day = draw_anatomy(7), draw_day(1, 3, 1.5)
    coarse, fine = render(who, day, COARSE), render(who, day, centred_grid((96, 84, 112), 4.0))
    averaged = fine.ct.coarsen(z=2, y=2, x=2).mean()
    assert float(abs(averaged - coarse.ct).mean()) < 8
    for name in STRUCTURES:
        small, large = (float(d.structures[name].sum()) * spacing_mm(d.ct)[0] ** 3 for d in (fine, coarse))
        assert abs(large / small - 1) < 0.25, name


def test_a_slab_at_a_time_gives_the_same_drawing():
    who, grid = draw_anatomy(2), centred_grid((24, 84, 112), 4.0)
    whole = render(who, Day(), grid).ct
    part = render(who, Day(), {**grid, "z": grid["z"][7:15]}).ct
    np.testing.assert_allclose(part, whole[7:15], atol=0.5)


@pytest.mark.parametrize("pose", [rigid((8, 0, 0)), rigid((0, -8, 16)), rigid((0, 0, 0), (0, 0, 90))])
def test_a_pose_is_a_movement_of_the_patient(pose):
    who, grid = draw_anatomy(4), centred_grid((24, 24, 24), 8.0)
    posed = render(who, Day(), grid, pose=pose).ct
    still = render(who, Day(), centred_grid((40, 40, 40), 8.0)).ct
    assert float(abs(posed - move(still, pose, fill=-1000, to=grid)).mean()) < 1.0
    assert float(abs(posed - move(still, np.linalg.inv(pose), fill=-1000, to=grid)).mean()) > 20


def test_each_change_goes_the_right_way():
    who, grid = draw_anatomy(6), centred_grid((72, 60, 60), 4.0)
    base = render(who, Day(), grid)

    def change(**kw):
        return render(who, Day(**kw), grid)
    assert change(loss_mm=2.0).structures["body"].sum() < base.structures["body"].sum()
    assert change(parotid=0.3).structures["parotid_left"].sum() < base.structures["parotid_left"].sum()
    z = {n: float((d * d.z).sum() / d.sum()) for n, d in
         (("shut", base.structures["mandible"]), ("open", change(jaw_deg=5).structures["mandible"]))}
    assert z["open"] < z["shut"] - 2
    left = change(fluid=(0, 1.0, 0)).ct - base.ct  # fluid in the left maxillary sinus only
    assert float(left.sel(x=slice(10, 45)).max()) > 800 and float(abs(left.sel(x=slice(None, -2))).max()) < 1
    helmet = change(helmet_mm=(8.0, 0, 0)).structures["helmet"]
    before = base.structures["helmet"]
    assert float((helmet * helmet.x).sum() / helmet.sum()) > float((before * before.x).sum() / before.sum()) + 3
    assert float((change(airway_mm=2).ct < -500).sum()) > float((base.ct < -500).sum())


def test_sessions_are_table_1(patient):
    table = read_claims("kv2ct_table1").set_index("patient")
    assert sum(len(s.kvs) for s in patient.training) == table.kv_raw[3] and len(patient.training) == table.ctor_raw[3]
    assert len(patient.test.kvs) == 1 and len({s.week for s in patient.sessions}) == len(patient.sessions)
    assert (patient.prescription_gy, patient.fractions) == (table.total_dose_gy[3], table.fractions[3])
    assert patient.geometry == kv_geometry(8) and patient.planning.shape == (48, 42, 56)
    for s in patient.sessions:
        assert s.ct.attrs["units"] == "HU" and np.isfinite(s.ct).all() and s.ct.dtype == np.float32
        assert all(np.isfinite(k).all() and k.dims == ("view", "v", "u") for k in s.kvs)


def test_seeds_make_people(patient):
    again, other = phantom_patient(3, voxel_mm=8), phantom_patient(3, voxel_mm=8, seed=1)
    xr.testing.assert_identical(again.test.ct, patient.test.ct)
    xr.testing.assert_identical(again.training[0].kvs[0], patient.training[0].kvs[0])
    assert float(abs(other.planning - patient.planning).mean()) > 20


def test_training_days_do_not_give_the_test_day_away(patient):
    """About as far apart as the prototype's patients: 17 HU over the grid."""
    mean = sum(s.ct for s in patient.training) / len(patient.training)
    apart = float(abs(mean - patient.test.ct).mean())
    assert 8 < apart < 30
    noise = float(abs(patient.test.ct - patient.test.truth.sel(z=patient.test.ct.z)).mean())
    assert noise < apart


def test_the_registration_matrix_undoes_the_pose(patient):
    for s in patient.sessions:
        truth = s.truth.sel(z=s.ct.z).astype(np.float32).assign_attrs(units="HU")
        head = {"z": slice(-60, 150)}
        errors = [float(abs(s.ct - move(truth, rigid(t), fill=-1000)).sel(head).mean())
                  for t in np.vstack([np.zeros(3), 3 * np.eye(3), -3 * np.eye(3)])]
        assert np.argmin(errors) == 0


def test_kv_residual_is_where_the_kv_was_taken():
    far = phantom_patient(2, voxel_mm=8, set_up=SetUp(residual_mm=6.0))
    s = far.test
    seen = s.kvs[0]
    with_it = kv_pair(s.truth, far.geometry, far.physics, seed=5, pose=s.kv_residuals[0])
    without = kv_pair(s.truth, far.geometry, far.physics, seed=5)
    assert float(abs(seen - with_it).mean()) < 0.5 * float(abs(seen - without).mean())
    assert np.abs(np.stack([s.kv_residuals[0] for s in far.sessions])[:, :3, 3]).mean() > 2


@pytest.mark.parametrize("shift_mm", [-8.0, 8.0])
def test_reprojection_moves_the_image_by_one_and_a_half(patient, shift_mm):
    kv, up = patient.test.kvs[0], reproject(patient, patient.test, shift_mm)
    pitch = float(kv.v[1] - kv.v[0])
    errors = {k * pitch: float(abs(up - kv.shift(v=k)).sel(v=slice(-120, 250)).mean()) for k in range(-4, 5)}
    assert min(errors, key=errors.get) == 1.5 * shift_mm
    xr.testing.assert_identical(reproject(patient, patient.test, 0.0), kv)


@pytest.mark.parametrize("number", [1, 8])
def test_head_box_holds_the_head(number):
    p = phantom_patient(number, voxel_mm=8)
    box = p.structures["body"].isel(p.head_box)
    assert (box.sizes["z"], box.sizes["y"]) == (28, 28) and box.sizes["x"] % 2 == 0
    assert int(box.sel(z=slice(-20, None)).sum()) == int(p.structures["body"].sel(z=slice(-20, None)).sum())
    empty = [e for e in (0, -1) if box.sel(z=slice(-20, None)).isel(x=e).any()]
    assert not empty  # some air to each side
    assert box.sizes["x"] * 8 < 224


def test_kv_shows_no_end_of_the_body(patient):
    rows = patient.test.kvs[0].sel(view="AP").mean("u")
    assert float(rows.sel(v=slice(-330, -250)).min()) > float(rows.sel(v=slice(-100, 100)).mean()) * 0.8


@pytest.mark.parametrize("bad, words", [
    ({"number": 11, "voxel_mm": 8}, "from 1 to 10"), ({"number": 1, "voxel_mm": 3}, "one of")])
def test_bad_requests_say_the_remedy(bad, words):
    with pytest.raises(ValueError, match=words):
        phantom_patient(**bad)


def test_one_day_of_water_keeps_its_mass():
    def water(to, pose, continued):
        z, y, x = np.meshgrid(*(to[a] for a in "zyx"), indexing="ij")
        ball = np.where(np.hypot(z, np.hypot(y, x)) < 80, 0.0, -1000.0)
        return move(volume(ball, **to, units="HU"), pose, fill=-1000)
    day = acquire(water, planning_grid(8), name="test", week=1, n_kv=2, geometry=kv_geometry(8),
                  physics=KVPhysics(couch=()), set_up=SetUp(), seed=3)
    litres = float((day.ct + 1000).where(day.ct > -900, 0).sum()) / 1000 * 8**3 / 1e6
    assert abs(litres / (4 / 3 * np.pi * 0.8**3) - 1) < 0.05 and len(day.kvs) == len(day.kv_residuals) == 2


def write_case(folder, voxel_mm=(5.0, 4.0, 4.0)):
    """A drawing through NIfTI files, on an anisotropic grid, elsewhere in the room."""
    drawn = render(draw_anatomy(3), Day(), centred_grid((72, 78, 110), voxel_mm))

    def there(v):
        return v.assign_coords(z=v.z - 700, y=v.y + 55, x=v.x - 12)
    write_nifti(there(drawn.ct).astype(np.int16, keep_attrs=True), folder / "ct.nii.gz")
    labels = sum((i + 1) * drawn.structures[n].values.astype(np.uint8) for i, n in
                 enumerate(("brainstem", "parotid_left", "parotid_right")))
    write_nifti(there(like(labels, drawn.ct, "1")), folder / "oar.nii.gz")
    names = {"Brainstem": 1, "LeftParotid": 2, "RightParotid": 3}
    (folder / "labels.json").write_text(json.dumps({"oar.nii.gz": names}))
    return drawn


@pytest.mark.parametrize("helper", ["Brainstem_PRV03", "Brainstem+3mm", "brainstem_prv 5", "Brainstem-PTV", "BrainStemSurf",
                                    "Brainstem_3mm", "brainstem minus ctv", "Brainstem ring"])
def test_a_helper_is_not_the_organ(helper):
    """Neither by its number, which is no dose, nor alone."""
    organ, other = (volume(np.full((1, 2, 3), True), **centred_grid((1, 2, 3), 2.0), units="1") for _ in range(2))
    assert best_named([("Brainstem", organ), (helper, other)])["brainstem"] is organ and best_named([(helper, other)]) == {}


@pytest.mark.parametrize("label", ["Ring_PTV70", "PTV70_ring", "Non-PTV parotid L", "PTV70 minus cord", "Parotid-PTV", "PTV70-Parotid_L",
                                   "PTV70 + 3", "PTVopt", "PTV_opt_70", "PTV no skin", "PTVnoSkin", "PTV70_crop", "nonPTV",
                                   "Parotid_L_avoid", "LeftParotidPRV"])
def test_what_is_made_of_a_target_is_none(label):
    assert structure_name(label) is None


def test_targets_and_organs_keep_their_names():
    assert {structure_name(n) for n in ("PTV", "CTV-N", "PTV_nodes 54 Gy", "CTV T+N", "PTV70 R neck", "ptv_70 (2)", "CTV optic")} == {"ctv"}
    of = {"Parotid-L": "parotid_left", "Oral Cavity": "oral_cavity", "Brain Stem": "brainstem", "Mandible_1": "mandible",
          "Submandibular_L": None}
    assert {n: structure_name(n) for n in of} == of
    first, second = (volume(np.full((1, 2, 3), True), **centred_grid((1, 2, 3), 2.0), units="1") for _ in range(2))
    assert best_named([("Mandible_1", first), ("Mandible_2", second)])["mandible"] is first
    assert best_named([("PTV_54", first), ("PTV_70", second)])["ctv"] is second


def test_a_real_case_comes_to_the_isocentre(tmp_path):
    drawn = write_case(tmp_path / "hn_x" / "a")
    assert find_headneck(tmp_path) == [tmp_path / "hn_x" / "a"]
    p = real_patient(tmp_path / "hn_x" / "a", 12, voxel_mm=8)  # 12: the counts of patient 2
    assert [len(s.kvs) for s in p.sessions] == [1, 1, 1] and p.kind == "real" and p.source == "a"
    for name in ("brainstem", "parotid_left", "parotid_right"):
        ours, wanted = p.structures[name], drawn.structures[name]
        for a in "xyz":
            assert abs(float((ours * ours[a]).sum() / ours.sum() - (wanted * wanted[a]).sum() / wanted.sum())) < 5
    assert float(abs(p.test.ct - p.planning).mean()) > 3  # days differ
    (tmp_path / "hn_x" / "a" / "labels.json").unlink()
    assert set(read_structures(tmp_path / "hn_x" / "a")) == set()
    top = real_patient(tmp_path / "hn_x" / "a", 1, voxel_mm=8).structures["body"]
    assert abs(float(top.z[top.any(("y", "x"))].max()) - 140) < 45  # no brainstem: by the top


def test_a_scan_ends_but_the_kv_goes_on(tmp_path):
    write_case(tmp_path / "hn_x")
    ct = render(draw_anatomy(3), Day(), centred_grid((72, 78, 110), (5.0, 4.0, 4.0))).ct.sel(z=slice(-100, None))
    write_nifti(ct, tmp_path / "hn_y" / "ct.nii.gz")
    for set_up in (SetUp(), SetUp(pose_mm=0, pose_deg=0)):
        p = real_patient(tmp_path / "hn_y", 2, voxel_mm=8, set_up=set_up)
        assert float(p.test.ct.isel(z=0).max()) < -900 < float(p.test.truth.isel(z=0).max())


@pytest.mark.parametrize("spoil, words", [
    (lambda ct: ct.where(ct < 500), "NaN"), (lambda ct: (ct + 1000) / 2000, "expected HU"),
    (lambda ct: ct + 1024, "expected HU"), (lambda ct: xr.full_like(ct, -1000.0), "expected HU")])
def test_a_bad_ct_is_refused_with_its_name(tmp_path, spoil, words):
    ct = render(draw_anatomy(3), Day(), COARSE).ct
    write_nifti(spoil(ct).astype(np.float32).assign_attrs(units="HU"), tmp_path / "hn_x" / "c7" / "ct.nii.gz")
    with pytest.raises(ValueError, match=words) as e:
        real_patient(tmp_path / "hn_x" / "c7", 1, voxel_mm=8)
    assert "c7" in str(e.value)


def test_no_data_dir_no_case(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir"):
        find_headneck(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="ct.nii.gz"):
        find_headneck(tmp_path)


def test_slabs_bound_the_memory():
    grid = centred_grid((96, 168, 224), 2.0)
    tracemalloc.start()
    render(draw_anatomy(1), Day(), {**grid, "z": np.arange(240) * 0.5 + 10})
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < 500  # MB, of an image of 35 MB; without slabs it grows with the image


def test_real_head_and_necks(data_dir):
    folders = find_headneck(data_dir)
    assert len(folders) >= 5
    named = [f for f in folders if (f / "labels.json").is_file()][:1] + folders[:1]
    for i, folder in enumerate(named):
        p = real_patient(folder, i + 1, voxel_mm=8)
        assert p.planning.shape == (48, 42, 56) and 2 < float(p.structures["body"].sum()) * 8**3 / 1e6 < 20
        skull = float(p.planning.sel(z=slice(0, 80)).max())
        assert skull > 600 and 1 < float(abs(p.test.ct - p.planning).mean()) < 60
        if (folder / "labels.json").is_file():
            glands = p.structures["parotid_left"], p.structures["parotid_right"]
            left, right = (float((m * m.x).sum() / m.sum()) for m in glands)
            assert left > 20 and right < -20
            z = float((p.structures["mandible"] * p.structures["mandible"].z).sum() / p.structures["mandible"].sum())
            assert z < -15  # below the brainstem: superior is +z
