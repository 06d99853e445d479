"""Stopping power, proton doses and DVH: ranges in water, signs, sums, what is refused."""
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from radrepro.core.volume import centred_grid, like, volume
from radrepro.dose.dvh import INDICES, dose_at_percent_gy, dose_at_volume_gy, dose_indices, dvh, mean_dose_gy, table_5
from radrepro.dose.hlut import HLUT, PYRADPLAN_HLUT, TISSUES, stoichiometric_hlut, stoichiometric_point
from radrepro.dose.protons import NoTargetError, Plan, PlanSize, Spots, forward, plan, read_plan, write_plan

STEP_MM = 2.0
WATER = volume(np.zeros((24, 24, 100), np.float32), **centred_grid((24, 24, 100), STEP_MM), units="HU")


def with_library():
    return pytest.importorskip("pyRadPlan", reason="dose needs the extra `dose`")


# --- stopping power -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("table", [PYRADPLAN_HLUT, stoichiometric_hlut()], ids=lambda t: t.name)
def test_a_table_is_exact_at_water_and_air_and_never_falls(table):
    assert table(0) == 1.0 and table(-1000) == 0.001
    assert (np.diff(table(np.arange(-1100, 3200))) >= 0).all()
    assert table.name in table.describe() and table.source in table.describe()


def test_water_is_water_at_every_density():
    water = {"H": 11.19, "O": 88.81}
    for density in (0.2, 0.5, 1.0, 1.3):
        np.testing.assert_allclose(stoichiometric_point(density, water), (1000 * (density - 1), density), rtol=1e-9, atol=1e-9)


def test_tissues_are_ordered_as_known():
    rsp = {n: stoichiometric_point(*t)[1] for n, t in TISSUES.items()}
    hu = {n: stoichiometric_point(*t)[0] for n, t in TISSUES.items()}
    assert list(rsp.values()) == sorted(rsp.values()) and list(hu.values()) == sorted(hu.values())
    assert rsp["adipose"] < 1 < rsp["muscle"] < 1.06  # fat is lighter than water, muscle a little heavier
    assert hu["adipose"] < 0 < hu["muscle"] < 80
    assert 1 + hu["cortical bone"] / 1000 > rsp["cortical bone"]  # calcium stops X-rays more than protons


@pytest.mark.parametrize("hu, rsp, word", [
    ((-1000, 0, 3000), (0, 1), "equally long"), ((-1000, 0, -5, 3000), (0, 1, 1, 2), "ascending"),
    ((-1000, 0, 3000), (0, 1, 0.9), "never fall"), ((-1000, 0, 3000), (-0.1, 1, 2), "from 0 upwards"),
    ((-900, 0, 3000), (0, 1, 2), "-1000 to 2000"), ((-1000, 0, np.nan), (0, 1, 2), "finite")])
def test_a_broken_table_is_refused(hu, rsp, word):
    with pytest.raises(ValueError, match=word):
        HLUT("broken", hu, rsp, "")


def test_the_default_is_the_librarys():
    with_library()
    from pyRadPlan.ct import default_hlut

    np.testing.assert_array_equal(default_hlut("protons"), np.stack([PYRADPLAN_HLUT.hu, PYRADPLAN_HLUT.rsp], 1))


# --- one pencil beam in water ---------------------------------------------------------------------------------------

def machine():
    from pyRadPlan.machines import load_from_name, validate_machine

    return validate_machine(load_from_name("protons", "Generic"))


def one_spot(energy_mev: float, angle_deg: float, ct=WATER, hlut=PYRADPLAN_HLUT, weight: float = 1.0) -> Plan:
    spot = Spots(np.array([0]), np.zeros((1, 2)), np.array([energy_mev]), np.array([weight]))
    size, everywhere = PlanSize(dose_grid_mm=STEP_MM, gantry_angles_deg=(angle_deg,)), like(np.ones(ct.shape, bool), ct, "1")
    return Plan(hlut, size, 60.0, 30, spot, everywhere, ct)


def along_x(ct, energy_mev=110.0, angle_deg=90.0, **kwargs) -> np.ndarray:
    m = machine()
    energy = float(m.energies[m.get_closest_energy_index(energy_mev)])
    return forward(one_spot(energy, angle_deg, **kwargs), ct).total.sum(("z", "y")).values


def r80_mm(depth_mm, curve) -> float:
    top = curve.argmax()
    fall = slice(top, top + 12)
    return float(np.interp(-0.8 * curve[top], -curve[fall], depth_mm[fall]))


@pytest.mark.parametrize("wanted_mev", [70.0, 100.0, 130.0])
def test_the_peak_lies_where_the_base_data_say(wanted_mev):
    with_library()
    m = machine()
    number = int(m.get_closest_energy_index(wanted_mev))
    kernel, depth_mm = m.get_kernel_by_index(number), 100.0 - WATER.x.values[::-1]
    curve = along_x(WATER, wanted_mev)[::-1]
    assert abs(depth_mm[curve.argmax()] - float(m.peak_positions[number])) <= 1.0
    fine_mm = np.arange(0, 170, 0.1)
    base = np.interp(fine_mm, kernel.depths + kernel.offset, kernel.idd)
    top = base.argmax()
    expected = float(np.interp(-0.8 * base[top], -base[top:top + 60], fine_mm[top:top + 60]))
    assert abs(r80_mm(depth_mm, curve) - expected) <= 0.2


def test_a_weight_is_a_million_protons_of_the_whole_course():
    with_library()
    m = machine()
    energy = float(m.energies[m.get_closest_energy_index(110.0)])
    joule = along_x(WATER).sum() / 1.1 * STEP_MM**3 * 1e-6
    assert 0.85 < joule / (1e6 * energy * 1.602177e-13) < 1.0  # nuclear reactions carry some of it away
    np.testing.assert_allclose(along_x(WATER, weight=3.0), 3 * along_x(WATER), rtol=1e-5)


def surface_at(x_mm: float):
    return like(np.where(WATER.x.values > x_mm, -1000.0, 0.0)[None, None] + np.zeros(WATER.shape), WATER)


def test_shifting_the_ct_shifts_the_dose():
    with_library()
    here = along_x(surface_at(70.0))
    for voxels in (1, -1):
        there = along_x(surface_at(70.0 + voxels * STEP_MM))
        assert there.argmax() - here.argmax() == voxels
        np.testing.assert_allclose(np.roll(here, voxels)[20:80], there[20:80], atol=0.01 * here.max())


def test_gantry_angles_are_iec():
    with_library()
    assert along_x(WATER, 70.0, 90.0).argmax() > 50 > along_x(WATER, 70.0, 270.0).argmax()  # 90: enters at the patient's left, +x
    tall = volume(np.zeros((24, 100, 24), np.float32), **centred_grid((24, 100, 24), STEP_MM), units="HU")
    energy = float(machine().energies[machine().get_closest_energy_index(70.0)])
    dose = forward(one_spot(energy, 0.0, tall), tall).total
    assert dose.sum(("z", "x")).values.argmax() < 50  # 0: enters at the front, -y


def test_denser_tissue_in_front_shortens_the_range():
    with_library()
    ct = surface_at(70.0)
    slab = (WATER.x.values > 40) & (WATER.x.values < 60)  # ten voxels of 2 mm
    bone = like(ct.values + 800.0 * slab, ct)
    shorter_mm = {}
    for table in (PYRADPLAN_HLUT, stoichiometric_hlut()):
        shorter_mm[table.name] = STEP_MM * (int(along_x(bone, hlut=table).argmax()) - int(along_x(ct, hlut=table).argmax()))
        assert abs(shorter_mm[table.name] - 20 * (table(800.0) - table(0.0))) <= STEP_MM
    assert shorter_mm["pyRadPlan default"] > 0


# --- a plan ---------------------------------------------------------------------------------------------------------

def made_up_patient():
    """A cylinder of water with a ball to treat, left of its axis, and an organ behind it."""
    grid = centred_grid((24, 24, 30), 6.0)
    z, y, x = np.meshgrid(*grid.values(), indexing="ij")
    body = y**2 + x**2 < 60**2
    planning = volume(np.where(body, 0.0, -1000.0).astype(np.float32), **grid, units="HU")
    shapes = {"body": body, "ctv": z**2 + (y + 6) ** 2 + (x - 15) ** 2 < 16**2, "brainstem": z**2 + (y - 33) ** 2 + x**2 < 10**2}
    structures = {n: volume(m, **grid, units="1") for n, m in shapes.items()}
    return SimpleNamespace(number=1, kind="phantom", planning=planning, structures=structures, prescription_gy=60.0, fractions=30)


SIZE = PlanSize(bixel_mm=10.0, dose_grid_mm=6.0, gantry_angles_deg=(60.0, 300.0), margin_mm=6.0, max_iterations=40)


@pytest.fixture(scope="module")
def made():
    with_library()
    return plan(made_up_patient(), stoichiometric_hlut(), SIZE)


def test_a_plan_treats_and_spares(made):
    patient = made_up_patient()
    values = dose_indices(made.planned_dose, patient.structures, 60.0)
    assert values["ctv_d95"] > 95 and values["ctv_d2"] < 110
    assert values["brainstem_d0.01cc"] < 4200  # cGy, 70 % of the prescription
    assert not made.planned_dose.where(~made.region.astype(bool), 0).any()


def test_forward_on_the_planning_ct_is_influence_times_weights(made):
    dose = forward(made, made_up_patient().planning)
    assert abs(dose.total - made.planned_dose).max() < 1e-3 * 60
    assert list(dose.fields) == [60.0, 300.0]
    np.testing.assert_allclose(sum(dose.fields.values()).values, dose.total.values, atol=1e-4 * 60)
    left, right = (float((f * f.x).sum() / f.sum()) for f in dose.fields.values())
    assert left > right  # the field from 60 degrees comes in from the left


def test_the_same_input_gives_the_same_bits(made):
    again = plan(made_up_patient(), stoichiometric_hlut(), SIZE)
    assert (again.spots.weight == made.spots.weight).all() and (again.planned_dose == made.planned_dose).all()


def test_a_plan_from_disk_gives_the_same_dose(made, tmp_path):
    back = read_plan(write_plan(made, tmp_path / "plan"))
    assert (back.hlut, back.size, back.prescription_gy, back.fractions) == (made.hlut, made.size, 60.0, 30)
    ct = made_up_patient().planning
    a, b = forward(made, ct), forward(back, ct)
    assert (a.total == b.total).all() and (back.planned_dose == made.planned_dose).all()
    with pytest.raises(FileNotFoundError, match="make the plan first"):
        read_plan(tmp_path)


def test_the_dose_comes_on_the_cts_grid(made):
    """A finer CT: the same water, doses interpolated from blocks of voxels."""
    patient = made_up_patient()
    fine = volume(patient.planning.values.repeat(2, 0).repeat(2, 1).repeat(2, 2), **centred_grid((48, 48, 60), 3.0), units="HU")
    on_fine = replace(made, planned_dose=like(np.zeros(fine.shape, np.float32), fine, "Gy"))
    dose = forward(on_fine, fine).total
    assert dose.shape == fine.shape
    blocks = dose.coarsen(z=2, y=2, x=2).mean()
    inside = made.planned_dose > 55
    assert abs(blocks - made.planned_dose).where(inside).mean() < 0.05 * 60


def test_what_cannot_be_planned_says_so(made, monkeypatch):
    patient = made_up_patient()
    del patient.structures["ctv"]
    with pytest.raises(NoTargetError, match="expected a CTV to plan for"):
        plan(patient, PYRADPLAN_HLUT, SIZE)
    with pytest.raises(ValueError, match="planning CT's grid"):
        forward(made, made_up_patient().planning[1:])
    with pytest.raises(ValueError, match="choose a multiple"):
        plan(made_up_patient(), PYRADPLAN_HLUT, replace(SIZE, dose_grid_mm=7.0))
    dense = HLUT("dense", (-1000, 0, 3000), (0.0, 1.0, 4.0), "made up")
    patient = made_up_patient()
    with pytest.raises(ValueError, match="clip metal"):
        forward(replace(made, hlut=dense), like(patient.planning.values + 3000 * patient.structures["ctv"].values, patient.planning))
    for wrong in ({"bixel_mm": 0.0}, {"gantry_angles_deg": (60.0, 60.0)}, {"gantry_angles_deg": ()}):
        with pytest.raises(ValueError, match="expected"):
            replace(SIZE, **wrong)
    monkeypatch.setitem(sys.modules, "pyRadPlan", None)
    with pytest.raises(ImportError, match="pip install --no-deps pyradplan==0.5.0"):
        forward(made, made_up_patient().planning)


# --- dose-volume ----------------------------------------------------------------------------------------------------

BOX = volume(np.ones((10, 10, 50), bool), **centred_grid((10, 10, 50), 4.0), units="1")
RAMP = like(np.broadcast_to(np.arange(50) + 0.5, BOX.shape).copy(), BOX, "Gy")
VOXEL_CC = 0.064


def test_a_uniform_dose_is_that_dose():
    flat = like(np.full(BOX.shape, 42.0), BOX, "Gy")
    assert abs(mean_dose_gy(flat, BOX) - 42) < 1e-9 and dose_at_percent_gy(flat, BOX, 95) == dose_at_percent_gy(flat, BOX, 2) == 42
    assert dose_at_volume_gy(flat, BOX, 0.01) == 42
    assert dvh(flat, BOX, levels_gy=[0, 42, 42.001]).tolist() == [100, 100, 0]


def test_a_ramp_has_a_straight_dvh():
    levels_gy = np.arange(0, 51)
    np.testing.assert_allclose(dvh(RAMP, BOX, levels_gy=levels_gy), 100 - 2 * levels_gy)
    percents = np.linspace(2, 98, 25)
    found = np.array([dose_at_percent_gy(RAMP, BOX, p) for p in percents])
    assert (np.diff(found) < 0).all()
    np.testing.assert_allclose(found, 50 - percents / 2, atol=0.5)  # a voxel is 1 Gy wide


def test_volumes_are_exact_between_voxels():
    """A column in which every dose differs: D_V is linear between the middles of the voxels' volumes."""
    row = BOX & (BOX.z == BOX.z[0]) & (BOX.y == BOX.y[0])
    for voxels in (0.5, 1.0, 1.5, 2.25, 10.0):
        assert abs(dose_at_volume_gy(RAMP, row, voxels * VOXEL_CC) - (50 - voxels)) < 1e-9
    for small_cc in (0.001, 0.01, 0.03):  # below half a voxel: the hottest one
        assert dose_at_volume_gy(RAMP, row, small_cc) == 49.5
    with pytest.raises(ValueError, match="ask for less"):
        dose_at_volume_gy(RAMP, row, 51 * VOXEL_CC)


def test_part_of_a_voxel_counts_as_that_part():
    half = BOX.astype(float)
    half[..., -1] = 0.5
    expected = (np.arange(49) + 0.5).sum() + 0.5 * 49.5
    assert abs(mean_dose_gy(RAMP, half) - expected / 49.5) < 1e-9
    hottest_cc = 100 * VOXEL_CC  # the hottest layer's volume: now two layers share it
    assert dose_at_volume_gy(RAMP, half, hottest_cc) < dose_at_volume_gy(RAMP, BOX, hottest_cc)
    with pytest.raises(ValueError, match="0 to 1"):
        mean_dose_gy(RAMP, 2.0 * half)


def test_grids_units_and_masks_are_checked():
    with pytest.raises(ValueError, match="one grid"):
        mean_dose_gy(RAMP, BOX[:, :, 1:])
    with pytest.raises(ValueError, match="one grid"):
        mean_dose_gy(RAMP, BOX.assign_coords(x=BOX.x + 2))
    with pytest.raises(ValueError, match="expected 'Gy'"):
        mean_dose_gy(like(RAMP.values, RAMP, "HU"), BOX)
    with pytest.raises(ValueError, match="empty"):
        mean_dose_gy(RAMP, BOX & False)
    with pytest.raises(ValueError, match="NaN"):
        mean_dose_gy(RAMP.where(RAMP > 1), BOX)
    assert mean_dose_gy(RAMP.where(RAMP > 1), BOX & (RAMP > 1)) > 25  # NaN outside does no harm


def slabs(**ranges):
    at = np.arange(50)
    return {n: like(BOX.values & (at >= low) & (at < high), BOX) for n, (low, high) in ranges.items()}


def test_table_5_is_synthetic_minus_days():
    structures = slabs(ctv=(30, 50), brainstem=(0, 10), parotid_left=(10, 12), parotid_right=(20, 30), oral_cavity=(5, 8),
                       mandible=(30, 35))
    rows = table_5(RAMP, {"fused": like(RAMP.values + 0.5, RAMP), "same": RAMP}, structures, 50.0)
    assert [r["metric"] for r in rows if r["model"] == "fused"] == list(INDICES)
    for r in rows:
        expected = 0.0 if r["model"] == "same" else {"%": 1.0, "cGy": 50.0}[r["unit"]]
        assert abs(r["value"] - expected) < 1e-6 and r["table"] == 5 and r["detail"] == "sCT minus gCT"


def test_both_parotids_are_one_organ():
    structures = slabs(parotid_left=(10, 12), parotid_right=(20, 30))
    both = (2 * 11 + 10 * 25) / 12
    assert abs(dose_indices(RAMP, structures, 50.0)["parotid_total_mean"] - 100 * both) < 1e-6
    structures["parotid_left"] = structures["parotid_left"] | structures["parotid_right"]  # what is in both counts once
    assert abs(dose_indices(RAMP, structures, 50.0)["parotid_total_mean"] - 100 * both) < 1e-6
    alone = table_5(RAMP, {"fused": RAMP}, slabs(parotid_left=(10, 12)), 50.0)
    assert all(np.isnan(r["value"]) and r["detail"].startswith("not contoured") for r in alone)
