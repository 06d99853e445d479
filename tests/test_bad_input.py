"""Bad input ends with one clear sentence: what was expected, what came, what to do. Never with a silent answer."""

import dataclasses
import json
import re

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from radrepro.core.volume import AXES, centred_grid, like, read_nifti, volume, write_nifti
from radrepro.ct5d import cvae
from radrepro.ct5d.linear import motion_displacement
from radrepro.data.cohorts import headneck_cases, thorax_cases
from radrepro.data.headneck import phantom_patient, real_patient
from radrepro.data.thorax import acquire, find_lungs, real_thorax, scale_hu
from radrepro.data.traces import Breathing, read_trace, slice_amplitudes, synthetic_trace, trace_of
from radrepro.kv2ct.fit import LITERAL, OURS, Converter
from radrepro.kv2ct.model import HierarchicalViT, ViTConfig
from radrepro.train.presets import ViTFit

Z_MM = np.linspace(-100, 100, 12)
PLAN = ViTFit(patch=7, encoder_dims=(16,), decoder_dims=(16,), steps=1, batch=2)


def sentence(call, *words, errors=(ValueError, FileNotFoundError)):
    """The one line that `call` fails with: it says expected, what was got or found, and (after a colon) the remedy."""
    with pytest.raises(errors) as raised:
        call()
    said = str(raised.value)
    assert "\n" not in said and len(said) < 500, said
    assert re.search(r"expected .+(got|found) .+: \w.+", said), said
    for w in words:
        assert re.search(w, said), f"{w!r} is not in {said!r}"
    return said


def head_hu():
    """A head and neck with skull and spine in HU on a coarse grid."""
    grid = centred_grid((40, 36, 40), (8.0, 8.0, 8.0))
    z, y, x = np.meshgrid(*(grid[a] for a in AXES), indexing="ij")
    r2 = (x / 75) ** 2 + (y / 95) ** 2
    head, trunk = r2 + ((z - 40) / 100) ** 2 < 1, (r2 < 0.6) & (z < 40)
    skull = head & (r2 + ((z - 40) / 100) ** 2 > 0.8) | trunk & ((x / 25) ** 2 + ((y - 30) / 25) ** 2 < 1)
    return volume(np.where(skull, 1500, np.where(head | trunk, 30, -1000)).astype(np.float32), **grid, units="HU")


def chest_hu():
    """A trunk with two lungs in HU on a coarse grid."""
    grid = centred_grid((32, 34, 40), (10.0, 9.0, 10.0))
    z, y, x = np.meshgrid(*(grid[a] for a in AXES), indexing="ij")
    lungs = ((abs(x) - 70) / 50) ** 2 + (y / 80) ** 2 + (z / 110) ** 2 < 1
    spine = (x / 20) ** 2 + ((y - 85) / 20) ** 2 < 1
    trunk = (x / 165) ** 4 + (y / 120) ** 4 < 1
    hu = np.where(lungs, -820, np.where(spine, 500, np.where(trunk, 30, -1000)))
    return volume(hu.astype(np.float32), **grid, units="HU")


@pytest.fixture
def heads(tmp_path):
    """Write a CT as the case hn_x/c7 and return a call that reads it."""

    def make(ct, labels=None):
        write_nifti(ct, tmp_path / "hn_x" / "c7" / "ct.nii.gz")
        if labels is not None:
            (tmp_path / "hn_x" / "c7" / "labels.json").write_text(labels)
        return lambda: real_patient(tmp_path / "hn_x" / "c7", 1, voxel_mm=8)

    make.ct = tmp_path / "hn_x" / "c7" / "ct.nii.gz"
    return make


@pytest.fixture
def chests(tmp_path):
    """The same for a thorax, with landmarks beside it."""
    marks = tmp_path / "lung_landmarks_x"
    marks.mkdir()
    ee = np.random.default_rng(0).uniform(0, 200, (40, 3))
    names = [f"{end}_{a}_mm" for end in ("ee", "ei") for a in "xyz"]
    pd.DataFrame(np.hstack([ee, ee + [0, -1, 8]]), columns=names).to_csv(marks / "case01_300.csv", index=False)

    def make(ct, landmarks=marks):
        write_nifti(ct, tmp_path / "thorax_x" / "c8" / "ct.nii.gz")
        return lambda: real_thorax(tmp_path / "thorax_x" / "c8", 1, landmarks=landmarks, shape=(16, 16, 16), n_scans=1)

    make.folder = tmp_path / "thorax_x" / "c8"
    return make


def with_nan(ct):
    ct = ct.copy()
    ct[9, 9, 9] = np.nan
    return ct


# --- a CT that is none


def test_these_heads_and_chests_are_good(heads, chests):
    assert float(heads(head_hu())().structures["body"].sum()) * 8**3 / 1e6 > 2
    assert float(chests(chest_hu())().lung_mask.sum()) > 50


def test_a_ct_with_nan(heads, chests):
    sentence(heads(with_nan(head_hu())), "the CT of c7: expected finite numbers, got 1 NaN or infinite voxels: fill")
    sentence(chests(with_nan(chest_hu())), "c8/ct.nii.gz: expected finite numbers, got 1 NaN or infinite voxels: fill")


WRONG = {
    "attenuation in 1/cm": lambda ct: (ct + 1000) * 0.0002,
    "0 to 1": lambda ct: (ct + 1000) / 2000,
    "stored without its intercept": lambda ct: ct + 1024,
    "tenths": lambda ct: ct / 10,
    "all air": lambda ct: ct * 0 - 1000,
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_ct_that_is_not_in_hu(heads, spoil):
    ct = spoil(head_hu()).assign_attrs(units="HU")
    sentence(
        heads(ct), r"the CT of c7: expected HU \(air near -1000, bone above 200\), got .* to .*: apply the rescale"
    )


UNSEEN = {
    "intercept applied twice": lambda ct: ct - 1024,
    "400 HU too high": lambda ct: ct + 400,
    "no intercept, padded with -2000": lambda ct: (ct + 1024).where(ct > -1000, -2000),
    "sign flipped": lambda ct: -ct,
}


@pytest.mark.parametrize("spoil", UNSEEN.values(), ids=UNSEEN)
def test_a_ct_whose_tissue_is_not_in_hu(heads, spoil):
    sentence(heads(spoil(head_hu()).assign_attrs(units="HU")), "the CT of c7: expected")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda ct: (ct + 1000) / 1400,
            "c8: expected a CT in HU with air and bone, got 0 to 1: convert it to HU first",
        ),
        (lambda ct: ct + 1024, "c8: expected a CT in HU with air and bone, got 24 to 1524: convert"),
        (lambda ct: ct - 1024, "expected"),
        (
            lambda ct: ct.where(ct > -500, 0).where(ct != -1000, -1000),
            r"expected lungs, got no air of more than 150 ml .*: check that the CT",
        ),
    ],
    ids=["0 to 1", "no intercept", "intercept twice", "no lungs"],
)
def test_a_thorax_that_is_not_in_hu_or_none(chests, spoil, words):
    sentence(chests(spoil(chest_hu()).assign_attrs(units="HU")), words)


def test_a_volume_that_says_it_is_not_in_hu():
    for call in (scale_hu, find_lungs):
        with pytest.raises(ValueError, match="^ct is in 'Gy', expected 'HU': convert it"):
            call(chest_hu().assign_attrs(units="Gy"))


def test_a_four_dimensional_nifti(heads, chests):
    for make, ct, path in ((heads, head_hu(), heads.ct), (chests, chest_hu(), chests.folder / "ct.nii.gz")):
        read = make(ct)
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.stack([image.get_fdata()] * 3, -1).astype(np.int16), image.affine), path)
        sentence(read, r"ct.nii.gz: expected three dimensions, got shape \(.*, 3\): split it first")


def test_a_flat_nifti(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5), np.int16), np.eye(4)), tmp_path / "a.nii")
    sentence(lambda: read_nifti(tmp_path / "a.nii"), r"expected three dimensions, got shape \(4, 5\)")


@pytest.mark.parametrize("keep", [5, 1000])
def test_a_damaged_nifti(tmp_path, keep):
    noise = volume(np.random.default_rng(0).normal(size=(12, 12, 12)), **centred_grid((12, 12, 12), 2.0), units="HU")
    path = write_nifti(noise, tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:keep])
    sentence(lambda: read_nifti(path), "a.nii.gz: expected")


def test_a_tilted_nifti_is_refused_in_one_line(tmp_path):
    tilt = np.array([[1, 0.2, 0, 0], [-0.2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), tilt), tmp_path / "a.nii")
    sentence(lambda: read_nifti(tmp_path / "a.nii"), "a.nii: expected axes parallel")


def test_labels_of_a_file_that_is_gone(heads):
    sentence(
        heads(head_hu(), json.dumps({"gone.nii.gz": {"Brainstem": 1}})),
        "expected a NIfTI file at .*gone.nii.gz, found none: check",
    )


def test_broken_labels(heads):
    sentence(heads(head_hu(), "{oops"), "labels.json")


def test_thorax_labels_without_their_names(chests):
    read = chests(chest_hu())
    write_nifti(like(np.zeros((32, 34, 40), np.uint8), chest_hu(), "1"), chests.folder / "labels.nii.gz")
    sentence(read, "labels.json")


def test_thorax_labels_on_another_grid(chests):
    read = chests(chest_hu())
    write_nifti(
        volume(np.zeros((4, 4, 4), np.uint8), **centred_grid((4, 4, 4), 9.0), units="1"),
        chests.folder / "labels.nii.gz",
    )
    sentence(read, r"c8: expected labels on the grid of ct.nii.gz, got \(4, 4, 4\) against \(32, 34, 40\): resample")


# --- a data_dir that holds nothing


def test_an_empty_data_dir(tmp_path, chests):
    (tmp_path / "empty" / "hn_nothing").mkdir(parents=True)
    sentence(
        lambda: headneck_cases("real", 5, data_dir=tmp_path / "empty"),
        r"expected a case \(ct.nii.gz in hn_",
        "found none: ",
    )
    split = {"train": 1, "validation": 1, "test": 1}
    sentence(
        lambda: thorax_cases("real", **split, data_dir=tmp_path / "empty"),
        r"expected thorax_\*/ct.nii.gz and lung_landmarks_\*",
        "found 0 and 0: add them, or use -p cohort phantom",
    )
    sentence(chests(chest_hu(), landmarks=tmp_path / "empty"), "expected lung_landmarks_.*found none: ")
    sentence(lambda: real_patient(tmp_path / "empty", 1, voxel_mm=8), "expected a NIfTI file at .*found none: check")


def test_landmarks_with_a_hole(chests, tmp_path):
    read, path = chests(chest_hu()), tmp_path / "lung_landmarks_x" / "case01_300.csv"
    table = pd.read_csv(path)
    table.loc[3, "ei_y_mm"] = np.nan
    table.to_csv(path, index=False)
    sentence(read, "case01_300.csv: expected finite columns", ": repair it")


# --- breathing


def test_traces_shorter_than_the_slices():
    trace = synthetic_trace(12, seed=0)
    sentence(
        lambda: slice_amplitudes(trace, Z_MM, start_s=10, scan_s=3),
        "covers the slices from 10.00 to 13.00 s, got 0.00 to 12.00 s: use a longer trace, or a larger pad_s",
    )
    chest, field = scale_hu(chest_hu()), like(np.zeros((3, 32, 34, 40), np.float32), chest_hu(), "mm")
    sentence(
        lambda: acquire(chest, chest, field, field, trace, n_scans=25, seed=0),
        "expected a trace of at least 90 s for 25 scans, got 12 s: use a longer recording, or fewer scans",
    )
    short = slice_amplitudes(trace, Z_MM[3:], start_s=2, scan_s=3)
    full = slice_amplitudes(trace, Z_MM, start_s=2, scan_s=3)
    alpha = volume(np.zeros((3, 12, 4, 4), np.float32), **centred_grid((12, 4, 4), (200 / 11, 50, 50)), units="mm")
    sentence(
        lambda: motion_displacement(alpha, alpha, short, full),
        r"moving: expected amplitude over the slices -100..100 mm, got -45..100 mm: pad",
    )


def test_traces_with_nan(tmp_path):
    times = np.arange(0, 20, 0.1)
    values = np.sin(times)
    values[50] = np.nan
    sentence(lambda: trace_of(times, values), "expected a trace without gaps, got NaN or infinite samples: drop")
    pd.DataFrame({"time_s": times, "amplitude": values}).to_csv(tmp_path / "t.csv", index=False)
    sentence(lambda: read_trace(tmp_path / "t.csv"), "t.csv: expected a trace without gaps, got NaN")
    trace = synthetic_trace(20, seed=0)
    with pytest.raises(
        ValueError, match="^expected a trace without NaN: drop or interpolate the missing samples first$"
    ):
        slice_amplitudes(trace.where(trace.time != trace.time[40]), Z_MM, start_s=5, scan_s=3)
    seen = slice_amplitudes(trace, Z_MM, start_s=5, scan_s=3)
    holed = Breathing(seen.amplitude.where(seen.amplitude.z > Z_MM[2]), seen.rate)
    alpha = volume(np.zeros((3, 12, 4, 4), np.float32), **centred_grid((12, 4, 4), (200 / 11, 50, 50)), units="mm")
    sentence(
        lambda: motion_displacement(alpha, alpha, seen, holed),
        "fixed: expected finite amplitude, got NaN: repair the trace",
    )


def small_cvae(**changes):
    torch.manual_seed(0)
    model = cvae.CVAE(cvae.CVAEConfig(**({"shape": (8, 8, 8), "channels": (4, 4)} | changes)))
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.parametrize("mode", ["global", "slice"])
def test_the_cvae_wants_one_amplitude_per_slice(mode):
    model, picture, trace = small_cvae(trace_mode=mode), torch.rand(1, 1, 8, 8, 8), torch.rand(1, 8, 1)
    for moving, fixed, name in ((trace[:, :6], trace, "trace_moving"), (trace, trace[:, :6], "trace_fixed")):
        sentence(
            lambda m=moving, f=fixed: model.predict(picture, m, f, spacing_mm=(4, 4, 4)),
            rf"{name}: expected \(b, slices, features\) = \(1, 8, 1\), got \(1, 6, 1\): give one amplitude per slice",
        )
    sentence(
        lambda: model.predict(picture[..., :7], trace, trace, spacing_mm=(4, 4, 4)),
        r"moving: expected .* = \(8, 8, 8\), got \(1, 1, 8, 8, 7\): resample",
    )


@pytest.mark.parametrize("what", ["picture", "trace"])
def test_the_cvae_refuses_nan(what):
    model, picture, trace = small_cvae(), torch.rand(1, 1, 8, 8, 8), torch.rand(1, 8, 1)
    holed = trace.clone()
    holed[0, 3] = np.nan
    if what == "picture":
        picture[0, 0, 3, 3, 3] = np.nan
        holed = trace
    sentence(lambda: model.predict(picture, trace, holed, spacing_mm=(4, 4, 4)), "NaN")


# --- weights


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latent_dim": 5}, r"latent_dim 5 \(file: 16\)"),
        ({"trace_mode": "global"}, r"trace_mode global \(file: slice\)"),
        ({"shape": (8, 8, 12)}, r"shape \(8, 8, 12\) \(file: \(8, 8, 8\)\)"),
    ],
)
def test_cvae_weights_of_another_configuration(tmp_path, change, words):
    model = small_cvae()
    path = cvae.save(model, tmp_path / "cvae.safetensors")
    with pytest.raises(
        ValueError, match=f"cvae.safetensors: expected weights with {words}: train anew, or load them without"
    ):
        cvae.load(path, dataclasses.replace(model.config, **change))


@pytest.fixture(scope="module")
def patient():
    return phantom_patient(1, voxel_mm=8)


@pytest.fixture(scope="module")
def trained(patient, tmp_path_factory):
    """A primary converter of one step, and the folder of its weights."""
    folder = tmp_path_factory.mktemp("fit")
    converter = Converter(patient, "primary", PLAN)
    converter.train(folder)
    return converter.load(folder), folder


OTHERS = {
    "narrower": ("primary", dataclasses.replace(PLAN, encoder_dims=(32,)), OURS),
    "the secondary": ("secondary", PLAN, OURS),
    "literal": ("primary", PLAN, LITERAL),
    "no mean residual": ("primary", PLAN, dataclasses.replace(OURS, mean_residual=False)),
}


@pytest.mark.parametrize("which, plan, reading", OTHERS.values(), ids=OTHERS)
def test_converter_weights_of_another_configuration(patient, trained, which, plan, reading):
    sentence(lambda: Converter(patient, which, plan, reading=reading).load(trained[1]), "model.safetensors")


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_converter_weights_that_are_no_weights(patient, tmp_path, damage):
    if damage == "damaged":
        (tmp_path / "model.safetensors").write_bytes(b"no weights")
    sentence(lambda: Converter(patient, "primary", PLAN).load(tmp_path), "model.safetensors")


# --- kV images


def test_the_vit_wants_its_own_kv_shape():
    model = HierarchicalViT(
        ViTConfig(kv_shape=(14, 15), out_shape=(4, 4, 4), n_phases=4, patch=7, encoder_dims=(16,), decoder_dims=(16,))
    )
    for shape in ((1, 2, 15, 14), (1, 1, 14, 15), (1, 2, 28, 30)):
        sentence(
            lambda s=shape: model(torch.zeros(s), torch.tensor([0])),
            r"expected kv of shape \(B, 2, 14, 15\), got \(",
            "sample it with the strides",
        )


def test_a_kv_that_its_strides_do_not_divide(trained):
    sentence(lambda: trained[0].predict(torch.zeros(2, 127, 126)), r"expected .*, got \((2, )?127, 126\): ")


BAD_KV = {
    "one view": lambda kv: kv.isel(view=[0]),
    "three views": lambda kv: kv.isel(view=[0, 1, 1]),
    "narrow": lambda kv: kv.isel(u=slice(120)),
    "no views": lambda kv: kv.isel(view=0),
    "on its side": lambda kv: kv.transpose("view", "u", "v"),
    "with NaN": lambda kv: kv.where(kv < float(kv.max())),
}


@pytest.mark.parametrize("spoil", BAD_KV.values(), ids=BAD_KV)
def test_the_converter_refuses_a_bad_kv(patient, trained, spoil):
    kv = patient.test.kvs[0]
    assert torch.isfinite(trained[0].predict(kv)).all()
    sentence(lambda: trained[0].predict(spoil(kv)), "kv")
