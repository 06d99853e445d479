"""Velocity -> displacement -> warped picture, against MONAI's DVF2DDF + Warp (7 squarings both).

The velocity fades to nothing at the border, so that MONAI's zero padding there makes no difference. Voxels of 1 mm,
so that MONAI's voxels are our millimetres. With a CUDA device, rows for it follow.
"""
from __future__ import annotations

import warnings

import torch
from harness import compare

from radrepro.core.warp import exp_velocity, upsample_field, warp

SPACING_MM = (1.0, 1.0, 1.0)


def picture_and_velocity(size: tuple[int, int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth random picture and velocity (mm, up to about 8) of `size` (z, y, x) voxels."""
    generator = torch.Generator().manual_seed(0)
    z, y, x = (torch.sin(torch.pi * (torch.arange(n) + 0.5) / n) ** 2 for n in size)
    taper = z[:, None, None] * y[None, :, None] * x[None, None, :]
    velocity = upsample_field(4 * torch.randn(1, 3, 4, 4, 4, generator=generator), size) * taper
    picture = upsample_field(torch.rand(1, 3, *(n // 4 for n in size), generator=generator), size)[:, :1]
    return picture.contiguous().to(device), velocity.contiguous().to(device)


def off_by_mm(integrate) -> float:
    """How far exp of a constant velocity of 5 mm is from 5 mm, at worst."""
    constant = torch.full((1, 3, 32, 32, 32), 5.0)
    return float((integrate(constant) - constant).abs().max())


def rows(size: tuple[int, int, int], device: str, *, gradients: bool) -> None:
    from monai.networks.blocks import DVF2DDF, Warp

    text = "x".join(map(str, size))
    picture, velocity = picture_and_velocity(size, device)
    dvf2ddf, monai_warp = DVF2DDF(num_steps=7), Warp()

    def ours():
        displacement = exp_velocity(velocity, SPACING_MM, squarings=7)
        return displacement, warp(picture, displacement, SPACING_MM)

    def theirs():
        displacement = dvf2ddf(velocity)
        return displacement, monai_warp(picture, displacement)

    def difference(a, b):
        constant = [off_by_mm(lambda v: exp_velocity(v, SPACING_MM, squarings=7)), off_by_mm(lambda v: dvf2ddf(v.to(device)).cpu())]
        return (f"max {float((a[0] - b[0]).abs().max()):.1e} mm; picture max {float((a[1] - b[1]).abs().max()):.1e}; "
                f"a constant 5 mm is off by {constant[0]:.1e} (ours) and {constant[1]:.2f} mm")

    with torch.no_grad():
        compare("exp_and_warp", "MONAI DVF2DDF + Warp", text, ours, theirs, agreement=difference, device=device)
    if not gradients:
        return

    def gradient(forward):
        def work():
            velocity.requires_grad_(True)
            forward()[1].square().mean().backward()
            gradient, velocity.grad = velocity.grad, None
            velocity.requires_grad_(False)
            return gradient
        return work

    inside = (..., *(slice(n // 8, -n // 8) for n in size))  # at a border at rest linear interpolation has a kink

    compare("exp_and_warp_gradient", "MONAI DVF2DDF + Warp", text, gradient(ours), gradient(theirs), device=device,
            agreement=lambda a, b: f"inside, relative {float((a - b)[inside].norm() / b[inside].norm()):.1e}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="monai.networks.blocks.Warp")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows((64, 64, 64), device, gradients=True)
        rows((128, 128, 128), device, gradients=True)
        rows((256, 256, 224), device, gradients=False)  # a whole thorax
