"""The latent diffusion model: what is diffused, where each condition acts, weights on disk, and a resumed training."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from radrepro.ct5d import fit_diffusion
from radrepro.ct5d.autoencoder import CTAutoencoder
from radrepro.ct5d.evaluate import MASK, make_pair, model_rows, wrong_traces
from radrepro.ct5d.fit import Pairs, write_scans
from radrepro.ct5d.fit_diffusion import make_pipeline, train_autoencoder, train_ldm, write_latents
from radrepro.ct5d.pipeline import VARIANTS, BreathingPipeline, ddim, slice_features
from radrepro.data.cohorts import thorax_cases
from radrepro.train import loop
from radrepro.train.presets import CT5DPreset, DiffusionFit

SHAPE, SPACING_MM = (16, 18, 20), (20.0, 15.0, 18.0)
PLAN = CT5DPreset(SHAPE, SPACING_MM, 2, 0, 1, 4, 0, 1, batch=2,
                  diffusion=DiffusionFit(4, 6, channels=(8, 8), latent_channels=4, block_channels=(16, 16, 16), trace_dim=8))
STATISTICS = {"mean": torch.tensor([0.1, -0.2, 0.0, 0.3]), "std": torch.tensor([1.0, 2.0, 0.5, 1.5]), "residual_std": torch.full((4,), 0.25)}


def pipeline(variant: str = "extension", plan: CT5DPreset = PLAN) -> BreathingPipeline:
    torch.manual_seed(0)
    d = plan.diffusion
    pipe = make_pipeline(VARIANTS[variant], plan, CTAutoencoder(plan.shape, d.level_strides, d.channels, d.latent_channels), STATISTICS, seed=0)
    torch.nn.init.normal_(pipe.unet.leave[-1].weight, std=0.1)  # untrained it answers 0: give it something to say
    pipe.set_progress_bar_config(disable=True)
    return pipe


def given(n: int = 1):
    g = torch.Generator().manual_seed(0)
    return torch.rand(1, 1, *SHAPE, generator=g), torch.rand(1, SHAPE[0], 1, generator=g), torch.rand(n, SHAPE[0], 1, generator=g)


def ask(pipe, ct, old, new, *, seed=1, steps=3):
    return pipe(ct, old, new, spacing_mm=SPACING_MM, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed))


def test_the_noise_is_that_of_the_equation():
    scheduler, x0 = ddim(), torch.full((20000,), 3.0)
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    for t in (0, 300, 700, 999):
        x = scheduler.add_noise(x0, noise, torch.tensor([t]))
        abar = float(scheduler.alphas_cumprod[t])
        assert x.mean().item() == pytest.approx(3 * abar**0.5, abs=0.03)
        assert x.var().item() == pytest.approx(1 - abar, abs=0.03)  # with the paper's print it would be (1 - abar)^2
    assert scheduler.alphas_cumprod[-1] == 0  # sampling starts where training has been: in noise that holds nothing of the target


def test_residual_and_whole_latent_are_undone():
    """What `target` makes, `velocity` has to undo: the decoder must see the fixed scan's latent either way."""
    for name in ("extension", "whole_latent"):
        pipe = pipeline(name)
        ct, old, new = given()
        z_m, z_f = pipe.encode(ct, old), pipe.encode(ct.flip(2), new)
        seen = []
        pipe.autoencoder.trunk = lambda z, levels, seen=seen: seen.append(z) or torch.zeros(len(z), 8, *z.shape[2:])
        pipe.velocity(pipe.target(z_m, z_f), torch.zeros(1, pipe.config.free_channels, *z_m.shape[2:]), z_m)
        torch.testing.assert_close(seen[0], pipe.autoencoder.encode(ct.flip(2), new).mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen[1], pipe.autoencoder.encode(ct, old).mean, atol=1e-4, rtol=1e-4)


def test_slices_are_told_their_own_amplitude():
    old, new = torch.zeros(1, 16, 1), torch.zeros(1, 16, 1)
    new[0, 12:] = 1.0
    told = slice_features(old, new, 4)[0]  # four latent slices of four
    assert told[:, 0].tolist() == [0, 0, 0, 0] and told[:, 1].tolist() == [0, 0, 0, 1] and told[:, 2].tolist() == [0, 0, 0, 1]
    assert told[:3, 4].argmax() == 2 and told[0, 4] == 0  # the rise is where it is
    assert slice_features(new, old, 4)[0, 3, 2] == -1  # moving to fixed has a sign


def test_aligned_traces_reach_only_where_they_should():
    """Without attention over slices, a change of the new trace in the last slices moves nothing at the first ones, but for the tokens."""
    pipe = pipeline("extension")
    for stage in (*pipe.unet.down, *pipe.unet.up):
        for attention in (stage.slices, stage.trace):
            if attention is not None:
                torch.nn.init.zeros_(attention.out.weight)
                torch.nn.init.zeros_(attention.out.bias)
    z = torch.randn(1, 4, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    old, new = torch.zeros(1, 16, 1), torch.zeros(1, 16, 1)
    other = new.clone()
    other[0, 12:] = 1.0
    a, b = (torch.cat(pipe.denoise(z, torch.tensor([500]), z, old, t), 1) for t in (new, other))
    differs = (a - b).abs().amax((0, 1, 3, 4))
    assert differs[:2].max() == 0 and differs[3] > 1e-4


@pytest.mark.parametrize("shape", [(13, 18, 15), (16, 17, 16)])
def test_any_size_and_velocity_stride(shape):
    plan = replace(PLAN, shape=shape)
    pipe = pipeline("paper", plan)
    ct, trace = torch.rand(1, 1, *shape), torch.rand(2, shape[0], 1)
    found = pipe(ct, trace[:1], trace, spacing_mm=SPACING_MM, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert found.warped.shape == (2, 1, *shape) and found.displacement_mm.shape == (2, 3, *shape)
    assert found.displacement_mm.abs().max() > 0 and pipe.velocity_stride == 4
    assert pipeline("paper", replace(plan, diffusion=replace(plan.diffusion, up_levels=1))).velocity_stride == 2


def test_bad_input():
    pipe = pipeline()
    ct, old, new = given(2)
    for match, args in (("1 to 100", {"steps": 0}), ("1 to 100", {"steps": 101})):
        with pytest.raises(ValueError, match=match):
            ask(pipe, ct, old, new, **args)
    with pytest.raises(ValueError, match="trace_fixed: expected"):
        ask(pipe, ct, old, new[:, :-1])
    with pytest.raises(ValueError, match="finite"):
        ask(pipe, ct, old, torch.full_like(new, torch.nan))
    with pytest.raises(ValueError, match="0..1"):
        ask(pipe, 1000 * ct, old, new)
    with pytest.raises(ValueError, match="one CT"):
        ask(pipe, ct.expand(3, -1, -1, -1, -1), old, new)
    uneven = replace(PLAN, diffusion=replace(PLAN.diffusion, level_strides=((2, 2, 2), (4, 2, 2))))
    with pytest.raises(ValueError, match="one stride on all axes"):
        _ = pipeline("paper", uneven).velocity_stride


def test_a_saved_pipeline_gives_the_same_ct_in_a_fresh_process(tmp_path):
    pipe, inputs = pipeline(), given()
    pipe.save_pretrained(tmp_path / "pipe")
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    save_file(dict(zip(("ct", "old", "new"), inputs)), tmp_path / "in.safetensors")
    code = f"""
import torch
from safetensors.torch import load_file, save_file
from radrepro.ct5d.pipeline import BreathingPipeline
torch.set_num_threads({torch.get_num_threads()})
pipe = BreathingPipeline.from_pretrained({str(tmp_path / "pipe")!r})
given = load_file({str(tmp_path / "in.safetensors")!r})
found = pipe(given["ct"], given["old"], given["new"], spacing_mm={SPACING_MM}, num_inference_steps=3, generator=torch.Generator().manual_seed(1))
save_file(dict(ct=found.warped.contiguous()), {str(tmp_path / "out.safetensors")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(load_file(tmp_path / "out.safetensors")["ct"], ask(pipe, *inputs).warped)


def test_rows_of_a_diffusion_model():
    """One pair: few steps beside many, fresh noise as a spread in mm, every wrong trace; sampling is repeatable."""
    case = next(c for c in thorax_cases("phantom", train=2, validation=0, test=1, seed=1) if c.split == "test")
    patient = case.load(PLAN.shape, PLAN.voxel_mm, PLAN.scans)
    pair, pipe = make_pair(patient, 0, 1, 2), pipeline()
    rows = model_rows("ldm_extension", pipe, pair, ddim_steps=8)
    found = {(r["metric"], r["detail"]): r["value"] for r in rows}
    wrong = {f"{MASK}, {t}, 5 steps" for t in wrong_traces(pair)}
    assert {d for m, d in found if m == "masked_mse"} == {MASK} | wrong | {f"{MASK}, {t}" for t in ("1 step", "2 steps", "5 steps")}
    assert found["sample_spread", f"{MASK}, 4 draws, 5 steps"] > 0 and {r["model"] for r in rows} == {"ldm_extension"}
    again = {(r["metric"], r["detail"]): r["value"] for r in model_rows("ldm_extension", pipe, pair, ddim_steps=8)}
    assert all(again[k] == v for k, v in found.items() if k[0] != "seconds")
    one = {(r["metric"], r["detail"]): r["value"] for r in model_rows("ldm_extension", pipe, pair, ddim_steps=1)}
    assert one["masked_mse", MASK] == found["masked_mse", f"{MASK}, 1 step"]


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    root = tmp_path_factory.mktemp("ldm")
    folders = []
    for case in [c for c in thorax_cases("phantom", train=2, validation=0, test=1, seed=1) if c.split == "train"]:
        folders.append(root / f"patient{case.number}")
        write_scans(case, PLAN, folders[-1])
    for name in ("code", "latents"):
        (root / name).mkdir()
    train_autoencoder(PLAN, folders, root / "code", seed=0)
    write_latents(CTAutoencoder.from_pretrained(root / "code" / "autoencoder"), folders, root / "latents")
    return root, folders


def test_residuals_are_standardised(patients):
    root, _ = patients
    stored = load_file(root / "latents" / "latents.safetensors")
    pairs = torch.cat([(z[i] - z[j])[None] for z in (stored["patient.0"], stored["patient.1"]) for i in range(len(z)) for j in range(len(z)) if i != j])
    n = len(stored["patient.0"])
    # over ordered pairs of n scans the mean square difference is 2 n / (n - 1) times the variance about the patient's mean
    torch.testing.assert_close((pairs**2).mean((0, 2, 3, 4)).sqrt(), stored["residual_std"] * (n / (n - 1)) ** 0.5, rtol=1e-3, atol=1e-5)


def first_losses(patients, tmp_path, monkeypatch, answer, step=0, plan=PLAN, variant="extension"):
    """(loss of that step, what the network was given) with `answer(clean, velocity shape)` in the network's place, and the pipeline's own numbers."""
    root, folders = patients
    heard = {}

    def once(model, loss_of, schedule, *, seed, folder, **how):
        heard.update(how, model=model, names=[n for n, p in model.named_parameters() if p.requires_grad])
        generator = loop.step_generator(seed, step)
        drawn = heard["pairs"] = Pairs.read(folders).draw(plan.batch, loop.step_generator(seed, step))

        def network(noisy, timestep, z_moving, trace_moving, trace_fixed):
            heard.update(noisy=noisy, timestep=timestep, z_moving=z_moving, trace_moving=trace_moving, trace_fixed=trace_fixed)
            z = load_file(root / "latents" / "latents.safetensors")
            z_fixed = torch.stack([z[f"patient.{p}"][j] for p, _, j in drawn])
            heard["clean"] = model.pipe.target(z_moving, z_fixed)
            return answer(heard["clean"], (len(noisy), 3, *model.pipe.autoencoder.latent_shape))

        heard["loss"] = float(loss_of(network, step, generator))
        return [heard["loss"]]

    monkeypatch.setattr(fit_diffusion, "fit", once)
    (tmp_path / "ldm").mkdir(exist_ok=True)
    train_ldm(variant, plan, folders, root / "code", root / "latents", tmp_path / "ldm", seed=0)
    return heard


def test_training_shows_a_noised_target_and_both_traces(patients, tmp_path, monkeypatch):
    root, folders = patients
    heard = first_losses(patients, tmp_path, monkeypatch, lambda clean, shape: (clean, torch.zeros(shape)))
    z = load_file(root / "latents" / "latents.safetensors")
    assert torch.equal(heard["z_moving"], torch.stack([z[f"patient.{p}"][i] for p, i, _ in heard["pairs"]]))
    pairs = Pairs.read(folders)
    for name, k in (("trace_moving", 1), ("trace_fixed", 2)):
        assert torch.equal(heard[name][..., 0], torch.stack([pairs.amplitudes[triple[0]][triple[k]] for triple in heard["pairs"]]))
    abar = ddim().alphas_cumprod[heard["timestep"]].reshape(-1, 1, 1, 1, 1)
    noise = (heard["noisy"] - abar.sqrt() * heard["clean"]) / (1 - abar).sqrt()
    assert noise.std().item() == pytest.approx(1, abs=0.15) and abs(noise.mean().item()) < 0.15
    assert heard["clean"].abs().max() > 0 and heard["slow"] == ("autoencoder.", fit_diffusion.DECODER_SHARE)
    learning = heard["names"]
    assert {n.split(".")[0] for n in learning} == {"unet", "trace_encoder", "velocity_head", "autoencoder"}
    assert not [n for n in learning if n.startswith(("autoencoder.down", "autoencoder.trace_down", "autoencoder.norm", "autoencoder.moments"))]


def test_loss_is_the_latents_error_and_the_warped_scans(patients, tmp_path, monkeypatch):
    """Without motion and with the right latent, what is left is IMAGE_WEIGHT times the scans' own difference: coarse first, whole at the end."""
    _, folders = patients
    for step, coarse in ((0, 2), (PLAN.diffusion.steps - 1, 1)):
        heard = first_losses(patients, tmp_path, monkeypatch, lambda clean, shape: (clean, torch.zeros(shape)), step)
        moving, fixed, *_ = Pairs.read(folders).gather(heard["pairs"])
        pooled = [torch.nn.functional.avg_pool3d(v, coarse) for v in (moving, fixed)]
        still = fit_diffusion.IMAGE_WEIGHT * torch.nn.functional.mse_loss(*pooled).item()
        assert heard["loss"] == pytest.approx(still, rel=1e-4)
        off = first_losses(patients, tmp_path, monkeypatch, lambda clean, shape: (clean + 2.0, torch.zeros(shape)), step)
        assert off["loss"] - still == pytest.approx(4 * fit_diffusion.LATENT_WEIGHT, rel=1e-3)

        def far_end(clean, shape):
            """Motion in the last column of velocities only, which is the picture's last fifth."""
            v = torch.zeros(shape)
            v[:, 1, ..., -1] = 15.0
            return clean, v

        moved = first_losses(patients, tmp_path, monkeypatch, far_end, step)
        assert abs(moved["loss"] - still) > 1e-4 * still  # at half resolution, too, the velocity covers the whole picture


def test_a_killed_training_goes_on_to_the_same_pipeline(patients, tmp_path, monkeypatch):
    root, folders = patients
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    train = lambda folder: train_ldm("extension", PLAN, folders, root / "code", root / "latents", folder, seed=0)
    often = lambda *a, **k: loop.fit(*a, **k, checkpoint_seconds=0)
    monkeypatch.setattr(fit_diffusion, "fit", often)
    train(whole)
    (whole / "checkpoint.safetensors").unlink()
    step_generator = loop.step_generator

    def dies(seed, step):
        if step == 4:
            raise KeyboardInterrupt
        return step_generator(seed, step)

    monkeypatch.setattr(loop, "step_generator", dies)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    assert (killed / "checkpoint.safetensors").exists()
    monkeypatch.setattr(loop, "step_generator", step_generator)
    train(killed)
    for part in ("unet", "velocity_head", "trace_encoder", "autoencoder"):
        a, b = (load_file(f / "pipeline" / part / "diffusion_pytorch_model.safetensors") for f in (whole, killed))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
