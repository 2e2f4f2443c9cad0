"""Changes to small images in [0, 1]: random ones to pre-train on, fixed ones to test on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Transform = Callable[[torch.Tensor], torch.Tensor]


def rotate_and_shift(
    images: torch.Tensor, degrees: torch.Tensor, right: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Turn each image counter-clockwise and move it by pixels; what comes in from outside is black."""
    count, _, height, width = images.shape
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    theta = images.new_zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = cos, -sin, -2 * right / width
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = sin, cos, -2 * down / height
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of each image with its own sigma, in pixels."""
    count, channels, height, width = images.shape
    distance = torch.arange(-2, 3, dtype=images.dtype)
    row = torch.exp(-(distance**2) / (2 * sigma.view(-1, 1) ** 2 + 1e-6))
    row = row / row.sum(1, keepdim=True)
    kernel = (row[:, :, None] * row[:, None, :]).repeat_interleave(channels, 0).unsqueeze(1)
    flat = F.pad(images, (2, 2, 2, 2)).reshape(1, count * channels, height + 4, width + 4)
    return F.conv2d(flat, kernel, groups=count * channels).view(count, channels, height, width)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pull every pixel toward mid-grey; factor 1 changes nothing, 0 gives plain grey."""
    return (images - 0.5) * factor.view(-1, 1, 1, 1) + 0.5


def invert(images: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Black for white where share is 1, unchanged where it is 0."""
    share = share.view(-1, 1, 1, 1)
    return images * (1 - share) + (1 - images) * share


def noise(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise of each image's own standard deviation, not clipped."""
    return images + strength.view(-1, 1, 1, 1) * torch.randn(images.shape, generator=generator)


def broad_augmentation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotation, shift, blur, contrast, inversion and noise, each by chance and in random strength."""
    count = len(images)

    def chance(share: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) < share).to(images.dtype)

    def between(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    images = rotate_and_shift(
        images,
        chance(0.6) * between(-35, 35),
        chance(0.5) * between(-1.2, 1.2),
        chance(0.5) * between(-1.2, 1.2),
    )
    images = blur(images, chance(0.3) * between(0.05, 1.0) + 0.01)
    images = contrast(images, 1 - chance(0.3) * between(0, 0.7))
    images = invert(images, chance(0.3))
    return noise(images, chance(0.4) * between(0, 0.35), generator)


AUGMENTATIONS: Mapping[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "broad": broad_augmentation
}


def seven_corruptions(*, seed: int) -> dict[str, Transform]:
    """The fixed changes of the out-of-distribution test, by name; the noise is drawn from `seed`."""

    def full(images: torch.Tensor, value: float) -> torch.Tensor:
        return torch.full((len(images),), value)

    def turned(degrees: float, pixels: float) -> Transform:
        return lambda x: rotate_and_shift(x, full(x, degrees), full(x, pixels), full(x, pixels))

    def noisy(images: torch.Tensor) -> torch.Tensor:
        return noise(images, full(images, 0.3), torch.Generator().manual_seed(seed))

    return {
        "rotation left": turned(30, 0),
        "rotation right": turned(-30, 0),
        "noise": noisy,
        "blur": lambda x: blur(x, full(x, 0.8)),
        "contrast": lambda x: contrast(x, full(x, 0.3)),
        "inversion": lambda x: invert(x, full(x, 1.0)),
        "shift": turned(0, 1),
    }
