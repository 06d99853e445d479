"""The CT autoencoder: sizes, what each branch sees and where, what is refused, weights on disk."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from radrepro.ct5d.autoencoder import CTAutoencoder, Decoded, LatentDistribution, autoencoder_loss
from radrepro.train.presets import PRESETS

STRIDES = ((2, 2, 2), (2, 2, 2))


def seeded(shape=(16, 12, 20), strides=STRIDES, channels=(8, 8), **changes) -> CTAutoencoder:
    torch.manual_seed(0)
    return CTAutoencoder(shape, strides, channels, **changes).eval()


def batch(shape, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, *shape, generator=g), torch.rand(n, shape[0], 1, generator=g)


@pytest.mark.parametrize(
    "preset, strides, expected",
    [
        ("paper", ((2, 2, 2), (2, 2, 2), (7, 2, 2), (1, 2, 2), (1, 2, 2)), (16, 16, 16)),
        ("laptop", STRIDES, (14, 16, 16)),
        ("quick", STRIDES, (7, 8, 8)),
    ],
)
def test_latent_of_the_presets(preset, strides, expected):
    """On the meta device: every layer is run, no memory is taken."""
    shape = PRESETS[preset].ct5d.shape
    with torch.device("meta"):
        model = CTAutoencoder(shape, strides, [8 * (i + 1) for i in range(len(strides))])
        latent = model.encode(torch.empty(1, 1, *shape), torch.empty(1, shape[0], 1)).mean
        back = model.decode(latent)
        features = [model.trunk(latent, n) for n in range(len(strides))]
    assert latent.shape == (1, 8, *expected) and model.latent_shape == expected
    assert back.ct.shape == (1, 1, *shape) and back.trace.shape == (1, shape[0], 1)
    for levels, f in enumerate(features):  # the promise that a velocity decoder builds on
        assert f.shape[1] == model.config.channels[-1 - levels]
        grown = list(expected)
        for stride in strides[::-1][:levels]:
            grown = [n * s for n, s in zip(grown, stride)]
        assert list(f.shape[2:]) == grown
    with pytest.raises(ValueError, match=f"levels: expected 0 to {len(strides) - 1}"):
        model.trunk(latent, len(strides))


@settings(max_examples=10, deadline=None)
@given(st.tuples(*[st.integers(3, 17)] * 3), st.sampled_from([STRIDES, ((2, 2, 2), (3, 1, 2)), ((4, 2, 1), (1, 2, 2), (1, 1, 2))]))
def test_any_size(shape, strides):
    model = seeded(shape, strides, (4,) * len(strides), latent_channels=3)
    ct, trace = batch(shape)
    decoded, distribution = model(ct, trace, torch.Generator().manual_seed(0))
    total = [1, 1, 1]
    for s in strides:
        total = [t * n for t, n in zip(total, s)]
    assert model.strides == tuple(total)
    assert distribution.mean.shape == (2, 3, *(-(-n // t) for n, t in zip(shape, total)))
    assert decoded.ct.shape == ct.shape and decoded.trace.shape == trace.shape


def test_padding_repeats_the_last_voxels():
    """A CT of 13 slices is one of 16 whose last four are alike, and the same holds for its trace and for the other axes."""
    small, large = seeded((13, 10, 19)), seeded((16, 12, 20))
    ct, trace = batch((13, 10, 19))
    wide = F.pad(ct, (0, 1, 0, 2, 0, 3), mode="replicate")
    long = torch.cat([trace, trace[:, -1:].expand(-1, 3, -1)], 1)
    with torch.no_grad():
        a, b = small.encode(ct, trace).mean, large.encode(wide, long).mean
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(small.decode(a).ct, large.decode(b).ct[:, :, :13, :10, :19])
        torch.testing.assert_close(small.decode(a).trace, large.decode(b).trace[:, :13])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_last_layer_puts_each_voxel_where_it_belongs(axis):
    """With strides that differ by axis: latent cell i becomes voxels s i .. s i + s - 1, channel j of a cell its voxel j."""
    strides = [1, 1, 1]
    strides[axis] = 3
    shape = [4, 5, 6]
    shape[axis] *= 3
    model = seeded(tuple(shape), (tuple(strides),), (4,), latent_channels=2)
    cells = torch.arange(shape[axis] // 3).float().view([-1 if i == axis else 1 for i in range(3)])
    layer = model.leave[-1]
    with torch.no_grad():  # voxel j of a cell says 10 * (what the trunk says) + j
        layer.weight.zero_()
        layer.weight[:, 0, 1, 1, 1] = 10.0
        layer.bias.copy_(torch.arange(3.0))
        model.leave[0] = torch.nn.Identity()
        model.trunk = lambda latent, levels: cells.expand(1, 4, *model.latent_shape)
        ct = model.decode(torch.zeros(1, 2, *model.latent_shape)).ct
    n = torch.arange(shape[axis])
    expected = (10 * (n // 3) + n % 3).float().view([-1 if i == axis else 1 for i in range(3)])
    torch.testing.assert_close(ct[0, 0], expected.expand(*shape))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7])
def test_no_voxel_is_jumped_over(step):
    model = seeded((2 * step, 2 * step, 2 * step), ((step, step, step),), (4,), latent_channels=2)
    ct, trace = batch(model.shape, 1)
    ct, trace = ct.requires_grad_(), trace.requires_grad_()
    model.encode(ct, trace).mean.square().sum().backward()
    assert (ct.grad != 0).all() and (trace.grad != 0).all()


@pytest.mark.parametrize("slice_", [0, 21, 55])
def test_an_amplitude_acts_where_its_slice_is(slice_):
    """Convolutions of 3 with stride 2, twice, and one of 3: cells further than two from its own do not hear of it, to the bit."""
    model = seeded((56, 8, 12))
    ct, calm = torch.rand(2, 1, 56, 8, 12), torch.zeros(2, 56, 1)
    bump = calm.clone()
    bump[:, slice_] = 1.0
    with torch.no_grad():
        change = model.encode(ct, bump).mean - model.encode(ct, calm).mean
    by_cell = change.abs().amax((0, 1, 3, 4))
    heard = by_cell.nonzero().flatten()
    assert len(heard) >= 2 and (heard - slice_ // 4).abs().max() <= 2
    inner = change[..., 1:-1, 1:-1]  # the same everywhere in the plane, but for the edge of the last convolution
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), atol=1e-5, rtol=0)


def test_the_decoded_trace_follows_its_slices():
    model = seeded((56, 8, 12))
    latent = torch.zeros(1, 8, *model.latent_shape)
    bumped = latent.clone()
    bumped[:, :, 3] = 5.0
    with torch.no_grad():
        change = (model.decode(bumped).trace - model.decode(latent).trace).abs()[0, :, 0]
    centre = float((change * torch.arange(56)).sum() / change.sum())
    assert abs(centre - 13.5) < 4 and (change[40:] == 0).all()  # cell 3: slices 12 to 15


def test_bad_input_is_refused():
    model = seeded()
    ct, trace = batch(model.shape)
    hole = ct.clone()
    hole[1, 0, 3, 4, 5] = float("nan")
    gap = trace.clone()
    gap[1, 5] = float("nan")
    for bad, words in (
        ((hole, trace), "ct: expected finite numbers in 0..1"),
        ((ct * 1400 - 1000, trace), "scale HU first"),
        ((ct - 0.5, trace), "0..1"),
        ((ct + 0.5, trace), "0..1"),
        ((ct, gap), "trace: expected finite"),
        ((ct, trace[:, :-1]), "one amplitude per slice"),
        ((ct, trace.mT), "one amplitude per slice"),
        ((ct, trace[:1]), "one amplitude per slice"),
        ((ct.transpose(2, 4), trace), "ct: expected"),
        ((ct[:, 0], trace), "ct: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            model.encode(*bad)
    with pytest.raises(ValueError, match="latent: expected"):
        model.decode(torch.zeros(1, 8, 4, 5, 3))
    with pytest.raises(ValueError, match="one number per level, that is 2"):
        CTAutoencoder((8, 8, 8), STRIDES, (8,))
    with pytest.raises(ValueError, match="stride"):
        CTAutoencoder((8, 8, 8), ((2, 2), (2, 2)), (8, 8))


def test_loss_in_closed_form():
    ct, trace = batch((4, 4, 4))
    mean, logvar = torch.full((2, 3, 2, 2, 2), 2.0), torch.full((2, 3, 2, 2, 2), 1.0)
    told = autoencoder_loss(Decoded(ct - 0.3, trace + 0.5), LatentDistribution(mean, logvar), ct, trace, kl_weight=0.1, trace_weight=3.0)
    kl = (4 + 2.718281828 - 2) / 2
    assert [float(v) for v in told] == pytest.approx([0.09 + 3 * 0.25 + 0.1 * kl, 0.09, 0.25, kl], rel=1e-4)
    perfect = autoencoder_loss(Decoded(ct, trace), LatentDistribution(mean * 0, logvar * 0), ct, trace, kl_weight=1, trace_weight=1)
    assert perfect.total == 0


def test_a_sample_has_the_mean_and_the_spread():
    distribution = LatentDistribution(torch.tensor([-5.0, 5.0]).repeat(5000), torch.tensor([0.0, -4.0]).repeat(5000))
    drawn = distribution.sample(torch.Generator().manual_seed(0)).view(5000, 2)
    torch.testing.assert_close(drawn.mean(0), torch.tensor([-5.0, 5.0]), atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.tensor([1.0, 0.1353]), atol=0.03, rtol=0)


def test_it_learns_ct_and_trace():
    """Boxes of random place under random slopes: sixty steps take both errors down."""
    torch.manual_seed(0)
    model = CTAutoencoder((8, 8, 8), STRIDES, (8, 16))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        g = torch.Generator().manual_seed(step)
        ct = torch.zeros(4, 1, 8, 8, 8)
        for i, (z, y, x) in enumerate(torch.randint(0, 5, (4, 3), generator=g).tolist()):
            ct[i, 0, z : z + 4, y : y + 4, x : x + 4] = 1.0
        trace = torch.rand(4, 1, 1, generator=g) + torch.rand(4, 1, 1, generator=g) * torch.linspace(-1, 1, 8)[:, None]
        told = autoencoder_loss(*model(ct, trace, g), ct, trace, kl_weight=1e-4, trace_weight=0.1)
        optimiser.zero_grad()
        told.total.backward()
        optimiser.step()
        losses.append([told.mse.item(), told.trace_mse.item()])
    first, last = (torch.tensor(part).mean(0) for part in (losses[:5], losses[-10:]))
    assert (last < 0.6 * first).all(), (first, last)


def test_saved_and_loaded(tmp_path):
    model = seeded((13, 10, 19))
    ct, trace = batch((13, 10, 19))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = CTAutoencoder.from_pretrained(tmp_path)
    with torch.no_grad():
        one, two = model.encode(ct, trace), again.encode(ct, trace)
        assert torch.equal(one.mean, two.mean) and torch.equal(one.logvar, two.logvar)
        assert torch.equal(model.decode(one.mean).ct, again.decode(two.mean).ct)
        assert torch.equal(model.decode(one.mean).trace, again.decode(two.mean).trace)
    assert not again.training and again.latent_shape == model.latent_shape
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError):  # a pickle's name: not even opened
        CTAutoencoder.from_pretrained(tmp_path)
