"""The cVAE: units and axes of its field, where each trace acts, its loss in closed form, weights on disk."""
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from radrepro.core.warp import exp_velocity, integrate
from radrepro.ct5d.cvae import CVAE, CVAEConfig, CVAEOutput, load, save
from radrepro.ct5d.cvae_loss import loss

SHAPE, SPACING_MM = (12, 14, 10), (5.0, 4.0, 6.0)


def small(**changes) -> CVAEConfig:
    return CVAEConfig(**{"shape": SHAPE, "channels": (4, 8, 8), "velocity_stride": 2, "latent_dim": 3} | changes)


def seeded(config, head=None) -> CVAE:
    torch.manual_seed(0)
    model = CVAE(config)
    if head is not None:  # an untrained model moves nothing: give its last layer something to say
        torch.nn.init.normal_(model.head.weight, std=head)
    return model.eval()


def batch(shape=SHAPE, k=1, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (*torch.rand(2, n, 1, *shape, generator=g), *torch.rand(2, n, shape[0], k, generator=g))


@settings(max_examples=12, deadline=None)
@given(st.tuples(*[st.integers(5, 20)] * 3), st.sampled_from([1, 2, 4]), st.sampled_from(["global", "slice"]),
       st.integers(1, 2))
def test_any_size(shape, stride, mode, k):
    model = seeded(small(shape=shape, velocity_stride=stride, trace_mode=mode, trace_features=k, channels=(4, 4)))
    m, f, b_m, b_f = batch(shape, k)
    out = model(m, f, b_m, b_f, generator=torch.Generator().manual_seed(0))
    assert out.velocity_mm.shape == (2, 3, *(-(-n // stride) for n in shape)) and out.mu.shape == (2, 3)
    p = model.predict(m, b_m, b_f, spacing_mm=SPACING_MM)
    assert p.warped.shape == m.shape and p.displacement_mm.shape == (2, 3, *shape) and not p.warped.requires_grad


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_integrate_of_a_linear_velocity(stride, axis):
    """v = a x along one axis: phi(x) = e^a x about the origin, so u = (e^a - 1) x; the grids share their box."""
    n, a = 32, 0.2
    shape = [4, 4, 4]
    shape[axis] = n
    centres = (torch.arange(n // stride) + 0.5) * stride * SPACING_MM[axis] - n * SPACING_MM[axis] / 2
    v = torch.zeros(1, 3, *[s // stride for s in shape])
    v[:, axis] = (a * centres).view([-1 if i == axis else 1 for i in range(3)])
    u = integrate(v, shape, SPACING_MM, stride=stride)
    fine = ((torch.arange(n) + 0.5) - n / 2) * SPACING_MM[axis]
    got = u[0, axis].movedim(axis, 0)[:, 0, 0]
    middle = slice(n // 4, -(n // 4))
    torch.testing.assert_close(got[middle], (math.exp(a) - 1) * fine[middle], atol=0.02 * SPACING_MM[axis], rtol=0)
    assert all(u[0, i].abs().max() == 0 for i in range(3) if i != axis)


def test_integrate_at_stride_one_is_the_exponential():
    v = torch.randn(1, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(integrate(v, (8, 8, 8), SPACING_MM, stride=1), exp_velocity(v, SPACING_MM))
    whole = integrate(v, (16, 16, 16), SPACING_MM, stride=2)  # padding is at the upper end, and cut off there
    torch.testing.assert_close(integrate(v, (15, 16, 13), SPACING_MM, stride=2), whole[:, :, :15, :, :13])
    with pytest.raises(ValueError, match="covers"):
        integrate(v, (20, 8, 8), SPACING_MM, stride=2)


def test_a_trace_acts_where_its_slice_is():
    """Slice form: a change from slice 48 on reaches as far as the kernels do, and no further.

    1-D kernels and slope: 5 slices, to 43. Half resolution: 21. Quarter: 10, less 1 for the bottom: 9. Half again: 18,
    less one each for the up-block, the tail and the head: 15."""
    shape = (64, 8, 8)
    model = seeded(small(shape=shape, channels=(8, 8), velocity_stride=2), head=1.0)
    m, _, b_m, b_f = batch(shape)
    changed = b_f.clone()
    changed[:, 48:] += 1.0
    z = torch.zeros(2, 3)
    with torch.no_grad():
        difference = (model.decode(m, b_m, changed, z) - model.decode(m, b_m, b_f, z)).abs().mean((0, 1, 3, 4))
    assert difference[24:].min() > 0 and difference[:15].max() == 0


@pytest.mark.parametrize("mode", ["global", "slice"])
def test_what_the_field_depends_on(mode):
    model = seeded(small(trace_mode=mode), head=1.0)
    m, f, b_m, b_f = batch()
    z = torch.zeros(2, 3)
    with torch.no_grad():
        v = model.decode(m, b_m, b_f, z)
        for other in ((f, b_m, b_f, z), (m, b_f, b_m, z), (m, b_m, b_f + 0.5, z), (m, b_m, b_f, z + 1)):
            assert not torch.allclose(model.decode(*other), v)
        one = model.decode(m[:1], b_m[:1], b_f[:1], z[:1])  # nothing mixes the samples of a batch
    torch.testing.assert_close(one, v[:1], atol=1e-5, rtol=1e-4)


def test_every_weight_learns():
    for mode in ("global", "slice"):
        model = seeded(small(trace_mode=mode), head=0.1)
        m, f, b_m, b_f = batch()
        out = model(m, f, b_m, b_f, generator=torch.Generator().manual_seed(0))
        loss(out, m, f, config=model.config, spacing_mm=SPACING_MM).total.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_z_comes_from_the_generator_alone():
    model = seeded(small(), head=1.0)
    m, f, b_m, b_f = batch()
    state = torch.random.get_rng_state()
    g = lambda s: torch.Generator().manual_seed(s)
    draw = lambda s: model.predict(m, b_m, b_f, spacing_mm=SPACING_MM, generator=g(s)).displacement_mm
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    zero = model.predict(m, b_m, b_f, spacing_mm=SPACING_MM).displacement_mm
    assert torch.equal(zero, model.predict(m, b_m, b_f, spacing_mm=SPACING_MM, z=torch.zeros(2, 3)).displacement_mm)
    a, b = (model(m, f, b_m, b_f, generator=g(s)).velocity_mm for s in (1, 2))
    assert not torch.equal(a, b) and torch.equal(state, torch.random.get_rng_state())
    mean = model(m, f, b_m, b_f)
    torch.testing.assert_close(mean.velocity_mm, model.decode(m, b_m, b_f, mean.mu))
    assert abs(float(mean.logvar.mean().detach()) + 1) < 0.2  # sigma^2 starts near 1/e


@settings(max_examples=15, deadline=None)
@given(st.floats(-2, 2), st.floats(-3, 2), st.floats(0, 1))
def test_loss_in_closed_form(mu, logvar, weight):
    m, f, *_ = batch()
    still = torch.zeros(2, 3, 6, 7, 5)
    told = loss(CVAEOutput(still, torch.full((2, 3), mu), torch.full((2, 3), logvar)), m, f, config=small(),
                spacing_mm=SPACING_MM, kl_weight=weight)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, math.exp(logvar / 2)), normal(0.0, 1.0))
    assert abs(float(told.kl) - 3 * float(kl)) < 1e-4
    torch.testing.assert_close(told.mse, ((m - f) ** 2).mean())
    torch.testing.assert_close(told.total, told.mse + weight * told.kl)


@pytest.mark.parametrize("coarse", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_loss_knows_the_right_displacement(axis, coarse):
    """M holds what F shows, further along one axis: pulling from there (+) undoes it, (-) does not."""
    f = torch.rand(1, 1, *[s // 2 for s in SHAPE], generator=torch.Generator().manual_seed(0))
    f = torch.nn.functional.interpolate(f, scale_factor=4, mode="trilinear")  # smooth, 24 x 28 x 20
    m = f.roll(4, 2 + axis)
    v = torch.zeros(1, 3, 12, 14, 10)
    v[:, axis] = 4 * SPACING_MM[axis]
    config, nought = small(shape=f.shape[2:]), torch.zeros(1, 3)
    value = lambda field: float(loss(CVAEOutput(field, nought, nought), m, f, config=config, spacing_mm=SPACING_MM,
                                     coarse=coarse).mse)
    assert value(v) < 0.45 * value(0 * v) and value(-v) > value(0 * v) * 0.8 and value(v) < 0.3 * value(-v)


def test_coarse_must_divide_the_stride():
    m, f, *_ = batch()
    with pytest.raises(ValueError, match="divisor of the velocity's stride 2"):
        loss(CVAEOutput(torch.zeros(2, 3, 6, 7, 5), torch.zeros(2, 3), torch.zeros(2, 3)), m, f, config=small(),
             spacing_mm=SPACING_MM, coarse=4)


def test_weights_on_disk(tmp_path):
    model = seeded(small(trace_mode="global", trace_features=2), head=1.0)
    path = save(model, tmp_path / "cvae.safetensors")
    again = load(path, model.config)
    assert again.config == model.config and isinstance(again.config.shape, tuple)
    m, _, b_m, b_f = batch(k=2)
    before, after = (n.predict(m, b_m, b_f, spacing_mm=SPACING_MM).warped for n in (model, again))
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match=r"latent_dim 5 \(file: 3\)"):
        load(path, dataclasses.replace(model.config, latent_dim=5))
    json.dumps(dataclasses.asdict(model.config))
    with pytest.raises(FileNotFoundError, match="found none"):
        load(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load(path)
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another model"):
        load(tmp_path / "other.safetensors")


def test_wrong_input_is_told_apart():
    model = seeded(small())
    m, f, b_m, b_f = batch()
    with pytest.raises(ValueError, match="moving: expected"):
        model.predict(m[..., :-1], b_m, b_f, spacing_mm=SPACING_MM)
    with pytest.raises(ValueError, match="fixed: expected"):
        model.encode(m, f[:, 0])
    with pytest.raises(ValueError, match="trace_fixed: expected"):
        model.predict(m, b_m, b_f[:, :-2], spacing_mm=SPACING_MM)
    for wrong in ({"trace_mode": "bellows"}, {"velocity_stride": 3}, {"velocity_stride": 4, "channels": (4,)},
                  {"shape": (12, 14)}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            small(**wrong)
