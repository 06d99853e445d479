"""What z carries, the conditional prior, and the studies that measure both on validation patients."""

import json
import math
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from radrepro.core.volume import to_tensor
from radrepro.core.warp import integrate, warp
from radrepro.ct5d import fit as ct5d_fit
from radrepro.ct5d import stages
from radrepro.ct5d.cvae import CVAE, CVAEConfig, CVAEOutput, Prediction, load
from radrepro.ct5d.cvae_loss import gaussian_kl, loss
from radrepro.ct5d.evaluate import draw_pairs, make_pair
from radrepro.ct5d.fit import train_cvae, write_scans
from radrepro.ct5d.studies import (
    GAIN,
    PAIRS,
    POSTERIOR,
    PRIOR,
    PRIOR_MEAN,
    STUDIES,
    Study,
    latent_use,
    study_preset,
    study_rows,
    study_tasks,
    train_study,
)
from radrepro.data.cohorts import ThoraxCase, thorax_cases
from radrepro.report.claims import rows_of
from radrepro.train import loop
from radrepro.train.presets import PRESETS, CT5DPreset, DiffusionFit, Preset

SPACING_MM = (5.0, 4.0, 6.0)
TINY = CT5DPreset((12, 16, 16), (26.0, 20.0, 22.0), 2, 1, 2, 4, 12, 1, DiffusionFit(0, 0), batch=2, warmup_steps=2)
CASES = thorax_cases("phantom", train=2, validation=1, test=2, seed=3)


def seeded(**changes) -> CVAE:
    torch.manual_seed(0)
    return CVAE(CVAEConfig(**{"shape": (12, 14, 10), "channels": (4, 8, 8), "velocity_stride": 2, "latent_dim": 3} | changes)).eval()


def batch(shape=(12, 14, 10), n=2):
    g = torch.Generator().manual_seed(0)
    return (*torch.rand(2, n, 1, *shape, generator=g), *torch.rand(2, n, shape[0], 1, generator=g))


def value(rows, metric, detail=None):
    [found] = rows[(rows.metric == metric) & ((rows.detail == detail) | (detail is None))].value
    return found


@pytest.fixture(scope="module")
def patient():
    return next(c for c in CASES if c.split == "validation").load(TINY.shape, TINY.voxel_mm, TINY.scans)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = []
    for case in (c for c in CASES if c.split == "train"):
        made.append(tmp_path_factory.mktemp(f"scans{case.number}"))
        write_scans(case, TINY, made[-1])
    return made


# --- the KL and the priors ------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(*[st.lists(st.floats(-3, 3), min_size=2, max_size=2)] * 4)
def test_the_kl_is_that_of_torch(mu, logvar, prior_mu, prior_logvar):
    q_p = [torch.tensor([v]) for v in (mu, logvar, prior_mu, prior_logvar)]
    normal = lambda m, v: torch.distributions.Normal(m, (0.5 * v).exp())
    known = torch.distributions.kl_divergence(normal(*q_p[:2]), normal(*q_p[2:])).sum(1)
    torch.testing.assert_close(gaussian_kl(*q_p), known, atol=1e-4, rtol=1e-4)
    assert gaussian_kl(*q_p[:2], *q_p[:2]).abs() < 1e-4 and gaussian_kl(*q_p) > -1e-4


@pytest.mark.parametrize("mode", ["global", "slice"])
def test_a_standard_prior_is_what_it_always_was(mode):
    """Names, first weights, KL and draws, to the bit."""
    model, other = seeded(trace_mode=mode), seeded(trace_mode=mode, prior="conditional")
    assert [k for k in other.state_dict() if not k.startswith("prior")] == list(model.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    torch.nn.init.normal_(model.head.weight, std=1.0)
    m, f, b_m, b_f = batch()
    out = model(m, f, b_m, b_f, generator=torch.Generator().manual_seed(1))
    told = loss(out, m, f, config=model.config, spacing_mm=SPACING_MM)
    assert torch.equal(told.kl, 0.5 * (out.mu**2 + out.logvar.exp() - 1 - out.logvar).sum(1).mean())
    assert torch.equal(told.kl, loss(CVAEOutput(*out[:3]), m, f, config=model.config, spacing_mm=SPACING_MM).kl)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(7))
    moved = lambda **z: model.predict(m, b_m, b_f, spacing_mm=SPACING_MM, **z).displacement_mm
    assert torch.equal(moved(generator=torch.Generator().manual_seed(7)), moved(z=noise))
    assert torch.equal(moved(), moved(z=torch.zeros(2, 3)))
    assert not torch.equal(moved(), moved(z=noise))


def test_weights_from_before_there_was_a_choice_are_read(tmp_path):
    model = seeded()
    config = {k: v for k, v in asdict(model.config).items() if k != "prior"}
    save_file(dict(model.state_dict()), tmp_path / "old.safetensors", metadata={"cvae_config": json.dumps(config)})
    assert load(tmp_path / "old.safetensors", model.config).config.prior == "standard"
    with pytest.raises(ValueError, match=r"prior conditional \(file: standard\)"):
        load(tmp_path / "old.safetensors", replace(model.config, prior="conditional"))
    with pytest.raises(ValueError, match="^prior: expected standard .* got 'flat'"):
        seeded(prior="flat")


@pytest.mark.parametrize("shape", [(12, 14, 10), (5, 7, 9)])
@pytest.mark.parametrize("mode", ["global", "slice"])
def test_the_conditional_prior_sees_the_picture_and_both_traces_of_its_own_pair(mode, shape):
    model = seeded(trace_mode=mode, prior="conditional", shape=shape)
    m, f, b_m, b_f = batch(shape)
    with torch.no_grad():
        mu, logvar = model.expect(m, b_m, b_f)
        for other in ((f, b_m, b_f), (m, b_f, b_m), (m, b_m, b_f.flip(1)), (m, b_m + 0.1, b_f)):
            assert not torch.equal(model.expect(*other)[0], mu)
        torch.testing.assert_close(model.expect(m[:1], b_m[:1], b_f[:1])[0], mu[:1])
    assert mu.shape == logvar.shape == (2, 3) and max(mu.abs().max(), logvar.abs().max()) < 0.2  # it starts near N(0, I)
    with pytest.raises(ValueError, match="trace_fixed: expected"):
        model.expect(m, b_m, b_f[:, 1:])


def test_at_test_z_is_drawn_from_the_conditional_prior():
    model = seeded(prior="conditional", shape=(4, 4, 4), channels=(4, 4))
    torch.nn.init.zeros_(model.prior_moments.weight)
    model.prior_moments.bias.data = torch.tensor([2.0, 0.0, -1.0, -2.0, 0.0, 1.0])  # means, log sigma^2
    asked = []
    model.decode = lambda moving, b_m, b_f, z: asked.append(z) or torch.zeros(len(z), 3, 2, 2, 2)
    m, b = torch.rand(4000, 1, 4, 4, 4), torch.rand(4000, 4, 1)
    model.predict(m, b, b, spacing_mm=SPACING_MM, generator=torch.Generator().manual_seed(0))
    model.predict(m[:1], b[:1], b[:1], spacing_mm=SPACING_MM)
    torch.testing.assert_close(asked[0].mean(0), torch.tensor([2.0, 0.0, -1.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(asked[0].std(0), torch.tensor([math.exp(-1), 1.0, math.exp(0.5)]), atol=0.1, rtol=0)
    torch.testing.assert_close(asked[1], torch.tensor([[2.0, 0.0, -1.0]]))


def test_the_conditional_prior_learns_to_be_the_posterior():
    model = seeded(prior="conditional")
    m, f, b_m, b_f = batch()
    torch.nn.init.constant_(model.moments.bias, 1.0)
    optimiser, kls = torch.optim.AdamW(model.parameters(), lr=2e-2), []
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
    for _ in range(80):
        told = loss(model(m, f, b_m, b_f), m, f, config=model.config, spacing_mm=SPACING_MM, kl_weight=1.0)
        optimiser.zero_grad()
        told.total.backward()
        if not kls:
            assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        optimiser.step()
        kls.append(told.kl.item())
    assert kls[0] > 1 and kls[-1] < 0.02 * kls[0]


@pytest.mark.parametrize("shape", [(16, 24, 17), (9, 8, 8)])
def test_a_velocity_on_every_eighth_voxel(shape):
    model = seeded(shape=shape, velocity_stride=8)
    m, f, b_m, b_f = batch(shape)
    out = model(m, f, b_m, b_f)
    assert out.velocity_mm.shape == (2, 3, *(-(-n // 8) for n in shape))
    assert np.isfinite(float(loss(out, m, f, config=model.config, spacing_mm=SPACING_MM, coarse=2).total.detach()))
    n, a = 64, 0.2  # v = a z about the middle: u = (e^a - 1) z
    v = torch.zeros(1, 3, n // 8, 1, 1)
    v[0, 0, :, 0, 0] = a * ((torch.arange(n // 8) + 0.5) * 8 - n / 2) * 5.0
    u = integrate(v, (n, 8, 8), SPACING_MM, stride=8)[0, 0, :, 4, 4]
    expected = (math.exp(a) - 1) * (torch.arange(n) + 0.5 - n / 2) * 5.0
    torch.testing.assert_close(u[16:-16], expected[16:-16], atol=0.15, rtol=0)
    with pytest.raises(ValueError, match=r"1, 2, 4 or 8, at most 2\^2"):
        seeded(velocity_stride=8, channels=(4, 4))


# --- what z carries -------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.floats(0, 3), st.floats(-3, 1), st.integers(0, 5))
def test_information_is_never_more_than_the_kl(n, spread, logvar, seed):
    g = torch.Generator().manual_seed(seed)
    mu, nought = spread * torch.randn(n, 4, generator=g), torch.zeros(n, 4)
    width = logvar + 0.3 * torch.randn(n, 4, generator=g)
    use = latent_use(mu, width, nought, nought)
    assert -1e-4 < use.information.mean() <= use.kl.mean() + 1e-4 and use.kl.shape == (n,)
    moved = latent_use(mu + 5, width, nought, nought)  # a posterior that lies elsewhere says no more
    torch.testing.assert_close(moved.information, use.information, atol=1e-3, rtol=1e-3)
    assert moved.kl.mean() > use.kl.mean()
    assert use.active_units == int((mu.var(0) > 0.01).sum())


def test_equal_posteriors_say_nothing_and_one_pair_is_none():
    use = latent_use(torch.full((5, 2), 3.0), torch.full((5, 2), -2.0), *torch.zeros(2, 5, 2))
    assert use.information.abs().max() < 1e-5 and use.active_units == 0 and use.kl.min() > 9
    with pytest.raises(ValueError, match="expected two pairs or more, got 1"):
        latent_use(*torch.zeros(4, 1, 2))


# --- rows -----------------------------------------------------------------------------------------------------------

class Oracle:
    """Moves by z times the truth; q says 1, the prior -0.5 +- nearly nothing: three ways to ask, three answers."""

    def __init__(self, patient):
        self.patient, self.config, self.asked = patient, SimpleNamespace(latent_dim=1), []
        self.scan = {s.amplitude.values.astype(np.float32).tobytes(): s for s in patient.scans}

    def encode(self, moving, fixed):
        return torch.ones(1, 1), torch.zeros(1, 1)

    def expect(self, moving, trace_moving, trace_fixed):
        return torch.full((1, 1), -0.5), torch.zeros(1, 1)

    def predict(self, moving, trace_moving, trace_fixed, *, spacing_mm, z=None, generator=None):
        self.asked.append(generator and generator.initial_seed())
        m, f = (self.scan[t.numpy().tobytes()] for t in (trace_moving, trace_fixed))
        u = to_tensor(self.patient.displacement(m, f)) * float(z if z is not None else -0.5 if generator is None else 0.0)
        return Prediction(warp(moving, u, spacing_mm), u)


def test_each_way_to_ask_has_its_own_number(patient):
    model = Oracle(patient)
    rows = study_rows("base", model, [patient], steps=7, seed=2)
    reduction = {how: value(rows, "masked_mse_reduction", how) for how in (PRIOR, PRIOR_MEAN, POSTERIOR, GAIN)}
    assert abs(reduction[PRIOR]) < 1e-3 and reduction[POSTERIOR] > 60 and reduction[PRIOR_MEAN] < -30
    assert reduction[GAIN] == pytest.approx(reduction[POSTERIOR] - reduction[PRIOR])
    assert value(rows, "kl") == pytest.approx(1.5**2 / 2) and value(rows, "information") == pytest.approx(0, abs=1e-6)
    drawn = draw_pairs(patient, PAIRS)
    assert model.asked[::3] == [make_pair(patient, *d).seed for d in drawn] and set(model.asked[1::3]) == {None}
    assert set(rows["count"]) == {PAIRS}
    assert set(rows.paper) == {"B"} and set(rows.table) == {2} and set(rows.patient) == {patient.number} and set(rows.seed) == {2}
    assert value(rows, "steps") == 7 and value(rows, "active_units") == 0


def test_the_mean_over_patients_is_the_reduction_of_their_mean_error(patient):
    """A patient who hardly breathes has nothing to reduce, and must not weigh as much as one who breathes deeply."""
    first = patient.scans[0].ct
    calm = replace(patient, number=7, scans=tuple(replace(s, ct=first + 0.05 * (s.ct - first)) for s in patient.scans))
    rows = study_rows("base", Oracle(patient), [patient, calm], steps=1, seed=0)
    mean = rows.groupby(["metric", "detail"]).value.mean()
    mse = mean["masked_mse"]
    assert mean["masked_mse_reduction"][POSTERIOR] == pytest.approx(100 * (1 - mse[POSTERIOR] / mse["unmoved"]))
    unmoved = rows[(rows.metric == "masked_mse") & (rows.detail == "unmoved")].set_index("patient").value
    assert unmoved[7] < 0.01 * unmoved[patient.number] and rows.groupby("patient").size().nunique() == 1


def test_a_model_that_moves_nothing_gains_nothing_and_its_kl_is_in_closed_form(patient):
    model = seeded(shape=TINY.shape, channels=(4, 4), velocity_stride=4)
    for p in (model.head.weight, model.moments.weight):
        torch.nn.init.zeros_(p)
    model.moments.bias.data = torch.tensor([0.5, 0.0, 0.0, -1.0, -1.0, -1.0])
    rows = study_rows("kl_0", model, [patient], steps=1, seed=0)
    assert all(abs(value(rows, "masked_mse_reduction", how)) < 1e-3 for how in (PRIOR, PRIOR_MEAN, POSTERIOR, GAIN))
    assert value(rows, "kl") == pytest.approx(0.5 * (0.25 + 3 * math.exp(-1)), rel=1e-5) and value(rows, "foldings") == 0
    assert value(rows, "information") == pytest.approx(0, abs=1e-5)


def test_folds_are_counted_of_the_draw(patient):
    class Folds(Oracle):
        def predict(self, moving, trace_moving, trace_fixed, *, spacing_mm, z=None, generator=None):
            u = torch.zeros(1, 3, *moving.shape[2:])
            if generator is not None:  # u_z = -2 z: phi(z) = -z, det J = -1 everywhere
                u[0, 0] = (-2 * spacing_mm[0] * torch.arange(moving.shape[2]))[:, None, None]
            return Prediction(moving, u)

    assert value(study_rows("base", Folds(patient), [patient], steps=1, seed=0), "foldings") == np.prod(TINY.shape)


# --- training, stages, tasks ----------------------------------------------------------------------------------------

def test_the_unchanged_variant_is_the_presets_own_model(folders, tmp_path):
    train_cvae("slice", TINY, folders, tmp_path, seed=4)
    own = load(tmp_path / "cvae.safetensors").state_dict()
    train_study(Study(), TINY, folders, tmp_path, seed=4)
    assert all(torch.equal(v, own[k]) for k, v in load(tmp_path / "cvae.safetensors").state_dict().items())
    assert all((study_preset(s, TINY).steps, study_preset(s, TINY).learning_rate) == (2, TINY.learning_rate) for s in STUDIES.values())
    assert study_preset(Study("literal"), TINY).kl_weight == 1 / (12 * 16 * 16) and study_preset(Study(0.0), TINY).kl_weight == 0


def test_the_weight_reaches_the_loss(folders, tmp_path):
    """The first loss has the first posterior's KL in it, 16 dimensions of log sigma^2 = -1, so many times."""
    first = {}
    for name in ("kl_0", "kl_1e-2", "kl_1"):
        (tmp_path / name).mkdir()
        first[name] = train_study(STUDIES[name], replace(study_preset(STUDIES[name], TINY), steps=1), folders, tmp_path / name, seed=0)[0]
    kl = 16 * 0.5 * math.exp(-1)
    assert first["kl_1"] - first["kl_0"] == pytest.approx(kl, rel=0.02)
    assert first["kl_1e-2"] - first["kl_0"] == pytest.approx(0.01 * kl, rel=0.02)


@pytest.mark.parametrize("name", ["conditional_literal", "velocity_8"])
def test_a_killed_training_goes_on_as_if_it_had_not_been(folders, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ct5d_fit, "fit", partial(loop.fit, checkpoint_seconds=0))
    places = [tmp_path / "whole", tmp_path / "killed"]
    for place in places:
        place.mkdir()
    whole = train_study(STUDIES[name], TINY, folders, places[0], seed=1)
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(ct5d_fit, "loss", dies)
        with pytest.raises(KeyboardInterrupt):
            train_study(STUDIES[name], TINY, folders, places[1], seed=1)
    assert train_study(STUDIES[name], TINY, folders, places[1], seed=1) == whole
    a, b = (load(p / "cvae.safetensors") for p in places)
    assert a.config.prior == STUDIES[name].prior and a.config.velocity_stride == STUDIES[name].velocity_stride
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_study_never_looks_at_a_test_patient(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "smallest", Preset("smallest", "0", PRESETS["quick"].kv2ct, TINY))
    loaded, of_case = [], ThoraxCase.load
    monkeypatch.setattr(ThoraxCase, "load", lambda self, *size: loaded.append(self.split) or of_case(self, *size))
    task = {t.name: t for t in study_tasks(PRESETS["smallest"], "phantom", "", tmp_path, "cpu", [0])}["B: study kl_1"]
    seen = []
    values = pd.read_csv(task.function(*task.arguments, report=lambda f, text="": seen.append(f)))
    assert sorted(loaded) == ["train", "train", "validation"] and seen[-1] == 0.8
    assert set(values.model) == {"kl_1"} and value(values, "steps") == 2 and np.isfinite(values.value).all()
    rows = rows_of(values, cohort="real", preset="smallest")
    assert set(rows.cohort) == {"phantom"} and set(rows.patient) == {str(c.number) for c in CASES if c.split == "validation"}
    assert task.function(*task.arguments, report=lambda *_: None).endswith("values.csv") and len(loaded) == 3  # read, not made again


def test_tasks_fit_into_the_list_of_the_stages():
    for name in ("quick", "laptop", "workstation"):
        preset = PRESETS[name]
        found = study_tasks(preset, "phantom", "", "out", "cpu", [0, 1])
        assert [t.name for t in found] == [f"B: study {n}, seed {s}" for s in (0, 1) for n in STUDIES]
        assert all(set(t.after) == {f"B: scans {c.number}" for c in t.arguments[1]} for t in found)
        names = {t.name for t in stages.tasks(preset, "phantom", "", "out", "cpu", [0, 1])}
        assert all(set(t.after) <= names for t in found) and not names & {t.name for t in found}
        cost = {t.name: t.cost for t in found}
        assert cost["B: study velocity_2, seed 0"] > cost["B: study base, seed 0"] > 0
    with pytest.raises(ValueError, match="expected a preset with validation patients, got none in 'blind'"):
        study_tasks(Preset("blind", "0", PRESETS["quick"].kv2ct, replace(TINY, validation_patients=0)), "phantom", "", "out", "cpu", [0])
