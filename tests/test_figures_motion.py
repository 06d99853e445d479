"""Paper B's figures: signs, sides, shapes of the real modules, and the slider's moments."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from radrepro.core.volume import from_tensor, like, to_tensor
from radrepro.ct5d.autoencoder import CTAutoencoder
from radrepro.ct5d.cvae import CVAE, CVAEConfig
from radrepro.ct5d.evaluate import make_pair
from radrepro.ct5d.fit_diffusion import make_pipeline
from radrepro.ct5d.pipeline import VARIANTS
from radrepro.data.thorax import phantom_thorax
from radrepro.data.thorax_anatomy import BUCKETS
from radrepro.data.traces import synthetic_trace
from radrepro.metrics.image import mse
from radrepro.report.claims import COLUMNS
from radrepro.report.figures_motion import (
    ask,
    coronal_picture,
    error_maps,
    figure_b1,
    figure_b4,
    hu_of,
    velocity_of,
)
from radrepro.report.figures_motion_dice import figure_b5
from radrepro.report.figures_motion_models import cvae_stages, figure_b2, figure_b3, ldm_stages
from radrepro.report.figures_motion_viewer import VIEWER_FRAMES, breathing_viewer, diaphragm_point, followed, law_path, point_to_follow
from radrepro.train.presets import CT5DPreset, DiffusionFit

SHAPE = (18, 20, 22)  # no stride divides all of it
WHERE = {"cohort": "phantom", "preset": "quick"}


@pytest.fixture(scope="module")
def patient():
    return phantom_thorax(2, shape=SHAPE, n_scans=4)


@pytest.fixture(scope="module")
def pair(patient):
    return make_pair(patient, 0, 2, 1)


def cvae(mode="slice", pull_mm=0.0, prior="standard"):
    torch.manual_seed(0)
    model = CVAE(CVAEConfig(SHAPE, trace_mode=mode, channels=(4, 6), latent_dim=3, prior=prior)).eval()
    model.head.bias.data[0] = pull_mm
    return model


def pipeline(variant="extension"):
    torch.manual_seed(0)
    plan = CT5DPreset(SHAPE, (17.0, 15.0, 16.0), 2, 0, 1, 4, 0, 1,
                      diffusion=DiffusionFit(1, 1, channels=(4, 8), latent_channels=4, block_channels=(8, 8, 16, 16), trace_dim=8))
    d = plan.diffusion
    statistics = {"mean": torch.zeros(4), "std": torch.ones(4), "residual_std": torch.ones(4)}
    pipe = make_pipeline(VARIANTS[variant], plan, CTAutoencoder(plan.shape, d.level_strides, d.channels, d.latent_channels), statistics, seed=0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def named(figure):
    return {t.name: t for t in figure.data}


@pytest.mark.parametrize("mode", ["slice", "global"])
@pytest.mark.parametrize("prior", ["standard", "conditional"])
def test_the_cvae_is_drawn_as_it_is(mode, prior):
    model = cvae(mode, prior=prior)
    stages = cvae_stages(model)
    by = stages.set_index("name")
    assert stages.name.is_unique and by.parameters.sum() == sum(p.numel() for p in model.parameters())
    assert by.loc["head", "shape"] == (1, 3, *model.config.velocity_shape) and by.loc["posterior 1", "shape"][2:] == tuple(-(-n // 2) for n in SHAPE)
    words = {n: t.text[0] for n, t in named(figure_b2("cvae", model, **WHERE)).items()}
    for row in stages[stages.name.str.match("posterior|down|up|head|tail|bottom")].itertuples():
        assert f"{row.shape[1]} channels; {'×'.join(map(str, row.shape[2:]))}" in words[row.name]
    assert "×".join(map(str, SHAPE)) in words["moved M"] and (f"{model.config.embedding_dim}" in words["z"]) == (mode == "global")


def test_every_weight_of_the_pipeline_is_in_one_box():
    for variant in ("paper", "extension"):
        pipe = pipeline(variant)
        stages = ldm_stages(pipe)
        by = stages.set_index("name")
        modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
        assert stages.name.is_unique and by.parameters.sum() == sum(p.numel() for m in modules for p in m.parameters())
        assert by.loc["moments", "shape"][1:] == (2 * 4, *pipe.autoencoder.latent_shape)
        assert by.loc["velocity head", "shape"][1] == 3 and by.loc["leave", "shape"][1] == 4 + VARIANTS[variant].free_channels
        words = {n: t.text[0] for n, t in named(figure_b3("ldm", pipe, **WHERE)).items()}
        for row in stages[stages.name.str.match(r"down|up|enter|leave")].itertuples():
            d, c, *plane = row.shape
            assert f"{c} channels; {d} slices of; {'×'.join(map(str, plane))}" in words[row.name]
        for i, block in enumerate(pipe.unet.down, 1):
            assert ("S Z T" in words[f"down {i}"]) == (block.trace is not None)


def test_errors_have_their_sign(pair):
    bright = like(pair.fixed.ct.values + 0.05, pair.fixed.ct)
    error, _ = error_maps(bright, pair)
    assert np.allclose(error, 70, atol=0.01) and error.attrs["units"] == "HU"
    same, gain = error_maps(pair.fixed.ct, pair)
    assert not same.values.any() and np.allclose(gain, -1400 * np.abs(pair.moving.ct.values - pair.fixed.ct.values), atol=1e-3)
    assert not error_maps(pair.moving.ct, pair)[1].values.any()  # no deformation is its own baseline


def test_4_shows_what_the_models_answer(pair):
    models = {"cvae_slice": cvae(pull_mm=12.0), "ldm_paper": pipeline("paper")}
    figure = figure_b4(pair, models, ddim_steps=2, **WHERE)
    shown, titles = named(figure), " ".join(a.text for a in figure.layout.annotations)
    y_mm = float((pair.mask * pair.mask.y).sum() / pair.mask.sum())
    for name, model in models.items():
        answer = from_tensor(ask(name, model, pair.moving, [pair.fixed.amplitude], seed=pair.seed, ddim_steps=2)[0].warped, pair.fixed.ct)
        gap = 1400 * (answer - pair.fixed.ct).sel(y=y_mm, method="nearest")
        assert np.abs(shown[f"{name}, picture − F [HU]"].z - gap.values).max() <= 0.51
        assert f"{mse(answer, pair.fixed.ct, pair.mask):.5f}" in titles
    scales = [a for n, a in figure.to_dict()["layout"].items() if n.startswith("coloraxis") and a["cmin"] != -1000]
    assert len(scales) == 2 and all(a["cmin"] == -a["cmax"] for a in scales)
    assert set(np.asarray(shown["F"].y)) == set(pair.fixed.ct.z.values)


def test_coronal_views_have_the_head_up(pair, patient):
    figure = figure_b1("cvae_slice", cvae(), pair.moving, {"a": pair.fixed.amplitude, "b": pair.moving.amplitude}, y_mm=0.0, **WHERE)
    for trace in figure.select_traces("heatmap"):
        axis = figure.layout[trace.yaxis.replace("y", "yaxis")]
        assert axis.range[0] < axis.range[1] and axis.autorange is not True and (np.diff(trace.y) > 0).all()
        across = figure.layout[trace.xaxis.replace("x", "xaxis")]
        assert axis.scaleanchor == trace.xaxis and across.range[0] < across.range[1]  # mm by mm, the patient's right on the left
    lung = like(patient.lung_mask_in(pair.moving).values.astype(np.float32), pair.moving.ct)
    rows = coronal_picture(hu_of(lung).sel(y=0, method="nearest"), "CT [HU]", "lung")
    filled = (np.asarray(rows.z) > 0).sum(1)
    top, base = (filled[part].sum() for part in (np.asarray(rows.y) > 40, np.asarray(rows.y) < -90))
    assert top > base  # abdomen below the lungs
    with pytest.raises(ValueError, match="coronal"):
        coronal_picture(pair.moving.ct.isel(z=0), "CT [HU]", "axial")


def test_the_velocity_lies_on_its_own_grid(pair):
    v, found = velocity_of("cvae_slice", cvae(pull_mm=8.0), pair.moving, pair.fixed.amplitude)
    step = float(pair.moving.ct.z[1] - pair.moving.ct.z[0])
    assert float(v.z[1] - v.z[0]) == pytest.approx(4 * step) and float(v.z[0] - pair.moving.ct.z[0]) == pytest.approx(1.5 * step)
    assert float(v.sel(vector="z").mean()) == pytest.approx(8, abs=0.3) and found.displacement_mm.shape[2:] == SHAPE


def test_5_is_the_mean_over_patients_of_their_seeds():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame([{"paper": "B", "patient": str(p), "model": m, "metric": "dice", "detail": b, "seed": s, "ours": rng.uniform(0.6, 1)}
                         for m in ("cvae_slice", "none", "ldm_short") for p in range(1, 5) for b in BUCKETS.values() for s in range(3)])
    rows = rows.reindex(columns=COLUMNS)
    summary = rows.iloc[:1].assign(patient="mean", ours=0.0)  # the table's own mean must not count
    figure = figure_b5(pd.concat([rows, summary]), **WHERE)
    of_patient = rows.groupby(["model", "detail", "patient"]).ours.mean()
    assert {t.name for t in figure.data} == {"cvae_slice", "none"} and "4 patients" in figure.layout.yaxis.title.text
    for t in figure.data:
        assert list(t.x) == list(BUCKETS.values())
        for bucket, mean, down, up in zip(t.x, t.y, t.error_y.arrayminus, t.error_y.array):
            values = of_patient[t.name, bucket]
            assert mean == pytest.approx(values.mean()) and down == pytest.approx(values.std(ddof=1)) and mean + up <= 1 + 1e-9
    with pytest.raises(ValueError, match="Dice|dice"):
        figure_b5(rows.assign(metric="mse"), **WHERE)


def test_the_slider_shows_the_ct_of_its_moment(patient, pair):
    breath = synthetic_trace(30, seed=5).sel(time=slice(3, 9))
    torch.manual_seed(1)
    model = cvae("global")
    nn.init.normal_(model.head.weight, std=3.0)  # untrained it hardly moves: let the trace be seen
    figure = breathing_viewer("cvae_slice", model, patient, pair.moving, breath, **WHERE)
    assert len(figure.frames) == VIEWER_FRAMES and len(figure.to_json()) < 300_000
    _, p = point_to_follow(patient, pair.moving)
    pictures = []
    for k in (0, 6, VIEWER_FRAMES - 1):
        ct, up, place, now, height = figure.frames[k].data[:5]
        assert now.x[0] == pytest.approx(float(figure.frames[k].name), abs=0.006)
        at = float(breath.interp(time=now.x[0] + float(breath.time[0])))
        assert now.y[0] == pytest.approx(at, abs=0.05)
        found = ask("cvae_slice", model, pair.moving, [pair.moving.amplitude * 0 + now.y[0]])[0]
        expected = from_tensor(found.warped, pair.moving.ct).sel(y=p[1], method="nearest").values
        assert ct.z.dtype == np.uint8 and np.abs(ct.z - 255 * expected.clip(0, 1)).max() <= 0.51
        u = from_tensor(found.displacement_mm, pair.moving.ct, "mm")
        assert np.abs(up.z + u.sel(vector="z").sel(y=p[1], method="nearest").values).max() <= 0.51  # tissue goes against the pull
        z, _, x = followed(u, p)
        assert (place.x[0], place.y[0]) == pytest.approx((x, z), abs=1e-3) and height.y[0] == pytest.approx(z, abs=1e-3)
        pictures.append(ct.z)
    assert not np.array_equal(pictures[0], pictures[1])
    assert [s.args[0][0] for s in figure.layout.sliders[0].steps] == [f.name for f in figure.frames]


def test_a_point_goes_where_its_tissue_goes(patient, pair):
    u = from_tensor(torch.tensor([9.0, -4.0, 2.0]).view(1, 3, 1, 1, 1).expand_as(torch.zeros(1, 3, *SHAPE)), pair.moving.ct, "mm")
    p = diaphragm_point(patient.lung_mask_in(pair.moving))
    assert np.allclose(followed(u, p), np.subtract(p, (9, -4, 2)), atol=1e-3)
    breath = synthetic_trace(30, seed=5).sel(time=slice(3, 9))
    height = law_path(patient, pair.moving, p, breath)[:, 0]
    assert np.corrcoef(height, breath.values)[0, 1] < -0.8  # down with every breath in
    assert to_tensor(u).shape == (1, 3, *SHAPE)


def test_the_tumour_is_followed_from_scan_to_scan(patient):
    for moving, fixed in zip(patient.scans, patient.scans[1:]):
        (what, p), (_, q) = point_to_follow(patient, moving), point_to_follow(patient, fixed)
        assert what == "tumour" and np.allclose(followed(patient.displacement(moving, fixed), p), q, atol=1.0)
    unknown = replace(patient, tumour_mm=None)
    assert point_to_follow(unknown, patient.scans[0]) == ("point on the diaphragm", diaphragm_point(patient.lung_mask_in(patient.scans[0])))


def test_the_tumour_is_where_amplitude_and_rate_say(patient):
    still = [like(np.zeros_like(v.values), v) for v in (patient.alpha_mm, patient.beta_mm)]
    for field in ("alpha_mm", "beta_mm"):
        mm = np.array([5.0, -3.0, 2.0])
        pushed = like(np.broadcast_to(mm[:, None, None, None].astype(np.float32), still[0].shape).copy(), still[0])
        one = replace(patient, **({"alpha_mm": still[0], "beta_mm": still[1]} | {field: pushed}))
        told = [s.amplitude if field == "alpha_mm" else s.rate for s in patient.scans]
        moved = np.array([point_to_follow(one, s)[1] for s in patient.scans]) - patient.tumour_mm
        amount = np.array([np.interp(z, t.z, t) for z, t in zip(moved[:, 0] + patient.tumour_mm[0], told)])
        assert np.ptp(amount) > 0.2 and np.allclose(moved, amount[:, None] * mm, atol=0.05)
