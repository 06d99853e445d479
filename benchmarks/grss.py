"""GRSS on the fly against shifting with scipy.ndimage and slicing: `python benchmarks/grss.py`.

Two peers. "one sample" draws like a training loop: every sample of a batch has its own shift, so scipy moves the whole
CT and both kVs for it and one phase is sliced out. "all phases" is the kindest case for scipy: one shift serves all
phases of a pair. Linear interpolation is the same formula on both sides, so there the two must agree to rounding;
with cubic ours is a local convolution and scipy's a spline fitted to the whole image.
A ratio is that of samples per second, since both sides make the same samples. A CUDA device is used where there is one.
"""
from __future__ import annotations

import torch
from harness import compare
from scipy import ndimage

from radrepro.kv2ct.grss import GRSS, PRIMARY, SECONDARY, Sampling, matched_pairs, phase_pairing

VOXEL_MM = 4.0
PITCH_MM = 0.75 * VOXEL_MM
ORDER = {"linear": 1, "cubic": 3}


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth random CT (96, 84, 112) and kV pair (2, 252, 252): the paper's field at 4 mm voxels."""
    generator = torch.Generator().manual_seed(0)

    def smooth(*shape):
        coarse = torch.randn(1, 1, *(n // 4 for n in shape), generator=generator)
        mode = "trilinear" if len(shape) == 3 else "bilinear"
        return torch.nn.functional.interpolate(coarse, size=shape, mode=mode)[0, 0]

    return 500 * smooth(96, 84, 112), torch.stack([smooth(252, 252) for _ in range(2)])


def by_scipy(ct, kv, sampling: Sampling, shift_mm: float, phases, order: int) -> list[tuple]:
    """The samples of `phases` at one shift: move everything, then slice."""
    ct = ndimage.shift(ct, (shift_mm / VOXEL_MM, 0, 0), order=order, mode="nearest")
    kv = ndimage.shift(kv, (0, 1.5 * shift_mm / PITCH_MM, 0), order=order, mode="nearest")
    (sz, sy, sx), k, out = sampling.ct_stride, sampling.kv_stride, []
    for phase in phases:
        z, y, x = phase // (sy * sx), phase // sx % sy, phase % sx
        v, u = phase_pairing(sampling)[phase].tolist()
        out.append((ct[z::sz, y::sy, x::sx].copy(), kv[:, v::k, u::k].copy()))
    return out


def rows(name: str, sampling: Sampling, interpolation: str, device: str) -> None:
    ct, kv = pair()
    grss = GRSS([ct], [kv], matched_pairs([0]), sampling, ct_spacing_z_mm=VOXEL_MM, kv_pitch_mm=PITCH_MM,
                interpolation=interpolation, device=device)
    ct_array, kv_array, order = ct.numpy(), kv.numpy(), ORDER[interpolation]
    shifts_mm = sampling.shifts_mm.tolist()

    def difference(ours, theirs):
        theirs = [torch.stack([torch.from_numpy(sample[i]) for sample in theirs]) for i in (0, 1)]
        parts = [float((a.cpu() - b).square().mean().sqrt() / b.std()) for a, b in zip((ours.ct, ours.kv), theirs)]
        return f"rms difference / sd: CT {parts[0]:.1e}; kV {parts[1]:.1e}"

    drawn = torch.randint(len(grss), (8,), generator=torch.Generator().manual_seed(1))
    wanted = [(shifts_mm[i % len(shifts_mm)], [i // len(shifts_mm) % sampling.n_phases]) for i in drawn.tolist()]

    def scipy_drawn():
        return [by_scipy(ct_array, kv_array, sampling, shift, phase, order)[0] for shift, phase in wanted]

    size = f"{name}, 8 drawn samples, {interpolation}"
    compare("grss", "scipy.ndimage.shift + slice (one sample)", size, lambda: grss.batch(drawn), scipy_drawn,
            agreement=difference, device=device)

    chosen = len(shifts_mm) // 2 + 17
    whole = torch.arange(sampling.n_phases) * len(shifts_mm) + chosen
    compare("grss", "scipy.ndimage.shift + slice (all phases)", f"{name}, {sampling.n_phases} phases, {interpolation}",
            lambda: grss.batch(whole), lambda: by_scipy(ct_array, kv_array, sampling, shifts_mm[chosen],
                                                        range(sampling.n_phases), order),
            agreement=difference, device=device)


if __name__ == "__main__":
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, sampling in (("primary", PRIMARY), ("secondary", SECONDARY)):
            for interpolation in ORDER:
                rows(name, sampling, interpolation, device)
