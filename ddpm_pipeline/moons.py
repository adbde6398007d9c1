"""MOONS: the built-in data set, drawn instead of downloaded, and a function that reads the phase from an image.

A moon image has one degree of freedom, its phase, an angle on the circle. So the samples of a model can be measured:
`phase_of` finds the nearest rendered moon and its distance, tiny for a moon, large for the grey mean of two moons.

    phase   0           pi / 2           pi      3 pi / 2
    moon    new moon    first quarter    full    last quarter
    lit     nothing     right half       all     left half

The moon is a unit sphere seen from far away along z, with x to the right and y up: pixel (x, y) shows the point with
the normal n = (x, y, sqrt(1 - x^2 - y^2)). The sun is far away at s = (sin phase, 0, -cos phase): behind a new moon,
behind the viewer at full moon. The day side is where the cosine n . s is positive. It ends at the terminator n . s = 0,
the half-ellipse x = cos(phase) sqrt(1 - y^2), mirrored when the moon wanes. The moon always shows the same face: seas,
craters and rays do not move, only the light does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from . import rng
from .pixels import from_pixels, height_width

Angles = float | Sequence[float] | np.ndarray | Tensor
Features = tuple[tuple[float, float, float, float], ...]

RADIUS = 0.46  # of the disc, in units of the shorter side of the image
OVERSAMPLING = 4  # a pixel is the mean of 4 x 4 sample points
TWILIGHT = 0.1  # the light fades while |n . s| is below this
EARTHSHINE = 0.07  # brightness of the night side; without it a new moon would be invisible

# The face of the Moon: latitude, longitude (degrees; north is up, east is right), radius (in radii of the Moon) and one
# more number. Coordinates are those of the USGS Gazetteer of Planetary Nomenclature, rounded; the rest is by eye.
SEAS: Features = (  # darkness
    (34, -18, 0.31, 0.34),  # Imbrium
    (27, 18, 0.18, 0.36),  # Serenitatis
    (9, 30, 0.22, 0.40),  # Tranquillitatis
    (17, 59, 0.13, 0.40),  # Crisium
    (-5, 51, 0.18, 0.32),  # Fecunditatis
    (-15, 35, 0.10, 0.30),  # Nectaris
    (14, 3, 0.09, 0.24),  # Vaporum
    (-21, -15, 0.20, 0.28),  # Nubium
    (-9, -24, 0.14, 0.26),  # Cognitum
    (-24, -39, 0.13, 0.36),  # Humorum
    (6, -34, 0.20, 0.26),  # Insularum
    (22, -56, 0.27, 0.34),  # Procellarum, north
    (-2, -52, 0.24, 0.32),  # Procellarum, south
    (57, -25, 0.09, 0.22),  # Frigoris, west
    (57, 15, 0.09, 0.22),  # Frigoris, east
)
CRATERS: Features = (  # lightness of the floor
    (-43, -11, 0.055, 0.03),  # Tycho
    (10, -20, 0.050, 0.03),  # Copernicus
    (-58, -14, 0.090, 0.03),  # Clavius
    (-18, -2, 0.045, 0.03),  # Arzachel
    (-9, -2, 0.065, 0.03),  # Ptolemaeus
    (-11, 26, 0.045, 0.08),  # Theophilus
    (-25, 60, 0.070, 0.03),  # Petavius
    (-9, 61, 0.055, 0.07),  # Langrenus
    (-44, -55, 0.085, 0.03),  # Schickard
    (52, -9, 0.045, -0.20),  # Plato
    (32, 30, 0.045, 0.03),  # Posidonius
    (-5, -68, 0.080, -0.24),  # Grimaldi
    *(  # and 90 unnamed ones: latitudes at equal steps of height, longitudes at steps of the golden angle
        (
            math.degrees(math.asin((2 * k + 1) / 90 - 1)),
            137.508 * k % 180 - 90,
            0.02 + 0.035 * (0.7549 * k % 1) ** 2,
            0.03,
        )
        for k in range(90)
    ),
)
RAYS: Features = (  # brightness
    (-43, -11, 0.055, 0.26),  # Tycho
    (10, -20, 0.050, 0.18),  # Copernicus
    (8, -38, 0.035, 0.16),  # Kepler
    (24, -47, 0.035, 0.20),  # Aristarchus
    (16, 47, 0.025, 0.12),  # Proclus
    (-32, 54, 0.035, 0.10),  # Stevinus
)


@overload
def lit_fraction(phase: float) -> float: ...
@overload
def lit_fraction(phase: Tensor) -> Tensor: ...
def lit_fraction(phase: float | Tensor) -> float | Tensor:
    """(1 - cos phase) / 2: the lit fraction of the disc, 0 for the new moon, 1 for the full moon."""
    return (1 - (phase.cos() if isinstance(phase, Tensor) else math.cos(phase))) / 2


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def render(phase: Angles, size: int | tuple[int, int] = 32, tilt: Angles = 0.0) -> Tensor:
    """The moon at this phase: brightness = albedo * (earthshine + daylight), daylight rising where n . s > 0.

    Args:
        phase: radians, any finite number; one, or B of them (list, array or tensor).
        size: side of the square image, or (H, W), in pixels.
        tilt: rotation of the image in radians, counterclockwise; one, or one per phase.
    Returns:
        float32 in [-1, 1], with -1 for the sky; (1, H, W) for one phase, (B, 1, H, W) for B of them.
    Raises:
        ValueError: an angle is not finite, size is not positive, or the numbers of tilts and phases differ.
    """
    phases, tilts = _angles("phase", phase), _angles("tilt", tilt)
    if tilts.ndim and tilts.shape != phases.shape:
        raise ValueError(f"tilt has shape {tuple(tilts.shape)}: give one, or one per phase {tuple(phases.shape)}")
    height, width = height_width(size)
    n, slope, albedo = _face(height, width)

    images = []
    chunk = max(1, 2**19 // albedo.numel())  # images whose sample points fit the CPU cache together
    for angle, turn in zip(phases.reshape(-1).split(chunk), tilts.expand(phases.shape).reshape(-1).split(chunk)):
        sin, cos = angle.sin().float()[:, None, None], angle.cos().float()[:, None, None]
        cosine = sin * n[0] - cos * n[2]
        # Ground that slopes away from the sun (relief > 0) is darker and loses its light sooner.
        relief = sin * slope[0] - cos * slope[2]
        day = ((cosine - 0.2 * relief) / TWILIGHT).clamp(-1, 1)
        day = 0.5 + day * (3 - day.square()) / 4  # smooth step from 0 to 1
        light = EARTHSHINE + (1 - EARTHSHINE) * day * (0.87 + 0.16 * cosine - 0.35 * relief)
        points = (albedo * light).clamp(0, 1)[:, None] * 2 - 1
        if turn.any():
            points = _rotate(points, turn, height, width)
        images.append(F.avg_pool2d(points, OVERSAMPLING))
    return torch.cat(images) if phases.ndim else torch.cat(images)[0]


def strip(phases: Angles, size: int = 128) -> Image.Image:
    """The moons at these phases side by side in one image of mode "L"."""
    return Image.fromarray(torch.cat([*_to_uint8(render(phases, size))], dim=-1)[0].numpy())


@lru_cache(maxsize=4)
def _face(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The surface: normals n (3, H', W'), slopes of the ground (3, H', W') and albedo (H', W')."""
    x, y = _grid(height, width)
    z = (1 - x.square() - y.square()).clamp(min=0).sqrt()
    n = torch.stack(torch.broadcast_tensors(x, y, z))

    # Seas: dark lava with ragged shores. Below, q is the distance from the centre in radii of the sea or crater.
    ragged = n
    for frequency in (9, 19, 41, 87):
        ragged = ragged + 0.3 / frequency * torch.sin(frequency * ragged.roll(1, 0) + frequency)
    darkness = torch.zeros_like(z)
    for latitude, longitude, radius, depth in SEAS:
        q = (ragged - _point(latitude, longitude)).square().sum(dim=0).sqrt() / radius
        darkness = torch.maximum(darkness, depth * torch.sigmoid((1 - q) / 0.09))
    albedo = 0.9 + 0.05 * torch.sin(13 * ragged[0] + 1) * torch.sin(15 * ragged[1] + 2) - darkness

    # Craters: a bowl with a rim. The ground rises to the rim at q = 1 and falls beyond it: slope q (1 - q^2) exp(-q^2).
    slope = torch.zeros_like(n)
    for latitude, longitude, radius, lightness in CRATERS:
        centre = _point(latitude, longitude)
        rows = ((y - centre[1]).abs() < 3 * radius).nonzero()[:, :1]
        columns = ((x - centre[0]).abs() < 3 * radius).nonzero()[:, 1]
        outwards = (n[:, rows, columns] - centre) / radius
        q2 = outwards.square().sum(dim=0)
        slope[:, rows, columns] += (1 - q2) * torch.exp(-q2) * outwards
        albedo[rows, columns] += lightness * torch.exp(-q2)
    slope *= 1 - 1.5 * darkness  # lava has filled the old craters

    # Rays: light dust, ejected by the youngest craters.
    for latitude, longitude, radius, brightness in RAYS:
        outwards = (n - _point(latitude, longitude)) / radius
        q, angle = outwards.square().sum(dim=0).sqrt(), torch.atan2(outwards[1], outwards[0])
        rays = (torch.cos(4 * angle + latitude) * torch.cos(7 * angle + longitude)).square()
        albedo += brightness * (torch.exp(-q / 2) + rays * torch.exp(-q / 6))

    points_inside = (1 - (x.square() + y.square()).sqrt()) * RADIUS * min(height, width) * OVERSAMPLING
    return n, slope, albedo.clamp(0, 1) * (points_inside + 0.5).clamp(0, 1)


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x (1, W') and y (H', 1) of the sample points, in radii of the moon from its centre."""
    y, x = ((torch.arange(n * OVERSAMPLING) + 0.5) / OVERSAMPLING - n / 2 for n in (height, width))
    return x[None, :] / (RADIUS * min(height, width)), -y[:, None] / (RADIUS * min(height, width))


def _point(latitude: float, longitude: float) -> Tensor:
    """The point n of the sphere at these coordinates in degrees, (3, 1, 1)."""
    lat, lon = math.radians(latitude), math.radians(longitude)
    return torch.tensor([math.cos(lat) * math.sin(lon), math.sin(lat), math.cos(lat) * math.cos(lon)])[:, None, None]


def _rotate(points: Tensor, tilt: Tensor, height: int, width: int) -> Tensor:
    """Rotate (B, 1, H', W') counterclockwise by tilt (B,): the value at (x, y) is that at (x, y) rotated back."""
    x, y = _grid(height, width)
    sin, cos = tilt.sin().float()[:, None, None], tilt.cos().float()[:, None, None]
    unit = 2 * RADIUS * min(height, width)  # grid_sample's coordinates go from -1 to 1 over the image, y down
    source = torch.stack([(cos * x + sin * y) * unit / width, (sin * x - cos * y) * unit / height], dim=-1)
    return F.grid_sample(points, source, padding_mode="border", align_corners=False)


def _to_uint8(images: Tensor) -> Tensor:
    """Pixels of images in [-1, 1], in float32, so that old runs resume on the same images.

    `pixels.to_pixels` computes in float64 and rounds a few pixels in a million the other way.
    """
    return ((images + 1) * 127.5).round().to(torch.uint8)


# ---- Reading the phase -----------------------------------------------------------------------------------------------


class PhaseMatch(NamedTuple):
    """The nearest rendered moon: two floats for one image, two tensors (B,) for a batch."""

    phase: Any  # radians in [0, 2 pi)
    distance: Any  # mean squared difference of the pixels, in [-1, 1]


def phase_of(images: Any, num_phases: int = 1024) -> PhaseMatch:
    """argmin over phases of mean (image - render(phase))^2, and this minimum.

    Args:
        images: (1, H, W) or (B, 1, H, W), an array or tensor, float in [-1, 1] or uint8; a PIL image of mode "L"; or a
            list of single images. They are compared with upright moons: a tilted moon has a large distance.
        num_phases: number of evenly spaced phases to compare with, at least 512.
    Raises:
        ValueError: another type, dtype, shape, mode or range (0..255 in float), or too few phases.
    """
    if not isinstance(num_phases, int) or num_phases < 512:
        raise ValueError(f"num_phases is {num_phases!r}: give an int of at least 512")
    pixels = _pixels(images)
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 1 or 0 in pixels.shape[-2:]:
        raise ValueError(f"images have shape {tuple(pixels.shape)}: give (1, H, W) or (B, 1, H, W)")
    bank = _bank(pixels.shape[-2], pixels.shape[-1], num_phases)
    # In float64, since cdist computes |a|^2 - 2 a . b + |b|^2, and neighbouring moons are close.
    nearest = torch.cdist(pixels.reshape(-1, bank.shape[1]).double(), bank.double()).min(dim=1)
    phase, distance = nearest.indices.double() * (2 * math.pi / num_phases), nearest.values.square() / bank.shape[1]
    return PhaseMatch(phase, distance) if pixels.ndim == 4 else PhaseMatch(phase.item(), distance.item())


@lru_cache(maxsize=2)
def _bank(height: int, width: int, num_phases: int) -> Tensor:
    return render(torch.arange(num_phases) * (2 * math.pi / num_phases), (height, width)).flatten(1)


def _pixels(images: Any) -> Tensor:
    """The images of phase_of as floats in [-1, 1], on the CPU."""
    if isinstance(images, (list, tuple)) and images:
        single = [_pixels(image) for image in images]
        shapes = sorted({tuple(image.shape) for image in single})
        if len(shapes) > 1:
            raise ValueError(f"images have shapes {shapes}: they must be equal")
        return torch.stack(single)
    if isinstance(images, Image.Image):
        if images.mode != "L":
            raise ValueError(f'image has mode {images.mode!r}: give mode "L"')
        images = np.array(images)[None]
    kind = str(getattr(images, "dtype", type(images))).removeprefix("torch.")
    supported = ("uint8", "float16", "bfloat16", "float32", "float64")
    if not isinstance(images, (np.ndarray, Tensor)) or kind not in supported:
        raise ValueError(f"images are {kind}: give float in [-1, 1], uint8, or PIL images")
    pixels = images.detach().cpu() if isinstance(images, Tensor) else torch.from_numpy(images.copy())
    if kind == "uint8":
        return from_pixels(pixels)
    if not (pixels.abs() <= 1).all():
        raise ValueError(f"images go from {pixels.min():g} to {pixels.max():g}: give float in [-1, 1], or uint8")
    return pixels.float()


# ---- The data set ----------------------------------------------------------------------------------------------------


class MoonDataset(Dataset[dict[str, Any]]):
    """Moons with phases uniform on the circle. Item i is a function of i and of the arguments alone.

    Args:
        length: number of images.
        size: side of the square images, or (H, W), in pixels.
        seed: any int; another seed gives other moons.
        tilt: every image is rotated by an angle uniform in [-tilt, tilt], radians.
    Raises:
        ValueError: length or size is not positive, seed is not an int, or tilt is negative or not finite.
    """

    def __init__(self, length: int = 8192, size: int | tuple[int, int] = 32, seed: int = 0, tilt: float = 0.0) -> None:
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length is {length!r}: give an int of at least 1")
        if not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}: give an int")
        if not isinstance(tilt, (int, float)) or not 0 <= tilt < math.inf:
            raise ValueError(f"tilt is {tilt!r}: give radians, 0 or more")
        self.length, self.size, self.seed, self.tilt = length, height_width(size), seed, tilt

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"image": uint8 (1, H, W), "phase": float, radians}. A negative i counts from the end, as in a list."""
        i = operator.index(i)
        return {"image": self.images([i])[0], "phase": self.phases([i]).item()}

    def phases(self, indices: Sequence[int] | np.ndarray | Tensor | None = None) -> Tensor:
        """Phases of these items, or of all: (B,) float64, radians in [0, 2 pi)."""
        return 2 * math.pi * rng.uniform(rng.key(self.seed, rng.Stream.MOON_PHASE), self._checked(indices))

    def images(self, indices: Sequence[int] | np.ndarray | Tensor | None = None) -> Tensor:
        """Images of these items, or of all, drawn together: (B, 1, H, W) uint8."""
        tilts = self.tilt * (2 * rng.uniform(rng.key(self.seed, rng.Stream.MOON_TILT), self._checked(indices)) - 1)
        return _to_uint8(render(self.phases(indices), self.size, tilts))

    def _checked(self, indices: Sequence[int] | np.ndarray | Tensor | None) -> Tensor:
        if indices is None:
            return torch.arange(self.length)
        index = np.asarray(indices, dtype=np.int64)
        if ((index < -self.length) | (index >= self.length)).any():
            raise IndexError(f"index {index} is out of range for {self.length} moons")
        return torch.from_numpy(index % self.length)


# ---- Helpers ---------------------------------------------------------------------------------------------------------


def _angles(name: str, value: Angles) -> Tensor:
    try:
        angles = torch.as_tensor(value if isinstance(value, Tensor) else np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}: give radians, one number or a list of them") from None
    if angles.ndim > 1 or not angles.isfinite().all():
        raise ValueError(f"{name} is {value!r}: give finite radians, one number or a list of them")
    return angles.detach().cpu().double()  # float64, so that the sine has the same bits in a batch of any size
