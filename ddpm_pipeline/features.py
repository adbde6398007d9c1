"""HOW GOOD: distances between two sets of images, given any feature extractor.

Two sets are alike if one cannot tell which of them a picture came from. An extractor makes each picture a row of
numbers, its features, and everything here compares the rows (N, D) of one set with the rows (M, D) of another. So the
figures belong to the extractor: its name stands beside them, and those of two extractors cannot be compared.

    frechet_distance, kernel_distance     how far apart the two laws are: 0 if they are one
    precision_recall, density_coverage    are the samples good; are all kinds of pictures among them
    nearest, memorisation                 are the samples copies of the training pictures
    channel_shift                         of the pixels themselves: are they too bright, too flat

An `Estimate` carries its standard error: another set of pictures from the same source would give another value, and
that is by how much.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

ENTRIES = 2**23  # about how many entries of a matrix of distances, or pixels, are in memory at a time
FORMAT = 1  # part of every cache key: raise it when the same pixels would give other features


class Extractor:
    """Pictures to features.

    Attributes:
        name: what a report says, as "pixels-16x16".
        key: of what the features depend on besides the picture; part of the cache's file names.
        is_inception: it is the network that FID and KID are defined with.
        accuracy: of the classifier on pictures it was not trained on; else None.
    """

    def __init__(
        self,
        name: str,
        key: str,
        compute: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str = "cpu",
        is_inception: bool = False,
        accuracy: float | None = None,
    ) -> None:
        self.name, self.key, self.is_inception, self.accuracy = name, key, is_inception, accuracy
        self._compute, self._device = compute, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), uint8 or uint16, of any size, to (B, D), float32, on the CPU.

        Raises:
            ValueError: another dtype or shape, or a number of channels that this extractor cannot take.
        """
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.uint16):
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}: give (B, C, H, W) uint8 or uint16")
        white = 255 if images.dtype == torch.uint8 else 65535
        features = self._compute((images.float() / white).to(self._device)).float().cpu()
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"{self.name} makes of {len(images)} images {tuple(features.shape)}: (B, D) is needed")
        return features


def extract_features(
    extractor: Extractor, images: np.ndarray, *, cache_dir: Path | None = None, batch_size: int = 256
) -> Tensor:
    """Features of all images, (N, D) float32, on the CPU; with cache_dir, from there if they were computed before.

    Args:
        images: (N, C, H, W), uint8 or uint16; may be memory-mapped.
        cache_dir: made if missing. A file is named by a hash of extractor.key and of the pixels; one that is damaged
            is made again.
    Raises:
        ValueError: another dtype or shape, no images, or a batch_size below 1.
    """
    _check_images("images", images, 1)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: give an int of at least 1")
    path = None if cache_dir is None else cache_dir / f"features-{_digest_of_images(extractor.key, images)}.safetensors"
    from .classifier import _load, _save

    cached = None if path is None else _load(path)
    if cached is not None:
        return cached["features"]
    features = []
    with tqdm(total=len(images), desc=f"features, {extractor.name}", unit=" images", leave=False) as progress:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size]))
            features.append(extractor(batch))
            progress.update(len(batch))
    whole = torch.cat(features)
    if path is not None:
        _save(path, {"features": whole})
    return whole


def make_extractor(
    which: str,
    *,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """An extractor by its name or file.

    Args:
        which: "pixels": averages over at most 16 x 16 places, in [-1, 1].
            "classifier": a small network, trained here on the images to tell their labels or, without labels, how a
            picture is turned (Gidaris et al. 2018, arXiv 1803.07728).
            A .th file: the ResNet-56 for CIFAR-10 of github.com/akamaster/pytorch_resnet_cifar10; gray or RGB, resized
            to 32 x 32.
            A .pt file: TorchScript, called with pictures in [-1, 1]; or the Inception network as it is handed out in
            this form for FID, gray or RGB.
        images: (N, C, H, W) uint8 or uint16: what the classifier learns from. The size of "pixels" is theirs if that
            is below 16.
        labels: (N,), for the classifier.
        cache_dir: where the trained classifier is kept; made if missing.
    Raises:
        ValueError: another name, a file that is missing or is not what its name says, or images and labels that the
            classifier cannot learn from.
    """
    if images is not None:
        _check_images("images", images, 1)
    if which == "pixels":
        return _pixels(images)
    if which == "classifier":
        if images is None:
            raise ValueError("images is None: the classifier has nothing to learn from")
        from .classifier import _classifier

        return _classifier(images, labels, cache_dir, device)
    path = Path(which).expanduser()
    if path.suffix not in (".th", ".pt"):
        raise ValueError(f'extractor is {which!r}: give "pixels", "classifier", or the path of a .th or .pt file')
    if not path.is_file():
        raise ValueError(f"extractor is {which!r}: there is no such file")
    return _resnet(path, device) if path.suffix == ".th" else _torchscript(path, device)


def _pixels(images: np.ndarray | None) -> Extractor:
    def compute(x: Tensor) -> Tensor:
        places = min(16, x.shape[2]), min(16, x.shape[3])
        return F.adaptive_avg_pool2d(2 * x - 1, places).flatten(1)

    height, width = (16, 16) if images is None else images.shape[2:]
    key = hashlib.sha256(f"pixels {FORMAT}".encode()).hexdigest()
    return Extractor(f"pixels-{min(16, height)}x{min(16, width)}", key, compute)


class _Block(nn.Module):
    """Two convolutions around a shortcut; where the size halves, the shortcut takes every second pixel and adds zeros.

    He et al. 2016, arXiv 1512.03385, section 4.2, option A. Names of layers are those of the file.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.new_channels // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + shortcut)


class _ResNet56(nn.Module):
    """(B, 3, 32, 32) to the 64 averages that its linear layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Block(channels_in, channels, stride), *(_Block(channels, channels, 1) for _ in range(8)))
            for channels_in, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


def _resnet(path: Path, device: torch.device | str) -> Extractor:
    with torch.random.fork_rng(devices=[]):  # the first weights, which the file's replace, are drawn
        network = _ResNet56().eval()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except Exception as error:  # of many types: not a file of torch's, other names, other shapes
        raise ValueError(f"{path} does not hold the ResNet-56 for CIFAR-10 ({type(error).__name__})") from None
    network.to(device)
    # of ImageNet's pixels, which this network was trained with on CIFAR-10
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def compute(x: Tensor) -> Tensor:
        x = _rgb(x)
        if x.shape[2:] != (32, 32):
            x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
        return network((x - mean) / std)

    return Extractor("cifar10-resnet56", _digest_of_file("resnet", path), compute, device=device)


def _torchscript(path: Path, device: torch.device | str) -> Extractor:
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {error}") from error
    key = _digest_of_file("torchscript", path)

    def inception(x: Tensor) -> Tensor:
        return network((_rgb(x) * 255).round().to(torch.uint8), return_features=True)

    takes = [argument.name for argument in network.forward.schema.arguments]
    if "Inception" in network.original_name and "return_features" in takes:
        with torch.no_grad():
            features = inception(torch.zeros(1, 3, 32, 32, device=device))
        if features.shape == (1, 2048):
            return Extractor("inception", key, inception, device=device, is_inception=True)
    return Extractor(path.name, key, lambda x: network(2 * x - 1), device=device)


def _rgb(x: Tensor) -> Tensor:
    if x.shape[1] not in (1, 3):
        raise ValueError(f"images have {x.shape[1]} channels: this extractor takes 1 or 3")
    return x.expand(-1, 3, -1, -1)


def _digest(tensors: dict[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].contiguous().numpy()
        sha256.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha256.update(array.data)
    return sha256.hexdigest()


def _digest_of_images(purpose: str, images: np.ndarray) -> str:
    sha256 = hashlib.sha256(f"{FORMAT} {purpose} {images.dtype.str} {images.shape} ".encode())
    for part in _parts(images):
        sha256.update(np.ascontiguousarray(part).data)
    return sha256.hexdigest()


def _digest_of_file(purpose: str, path: Path) -> str:
    return hashlib.sha256(f"{FORMAT} {purpose} ".encode() + path.read_bytes()).hexdigest()


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, ENTRIES // math.prod(images.shape[1:]))
    return (images[start : start + step] for start in range(0, len(images), step))


def _check_images(name: str, images: np.ndarray, least: int) -> None:
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{name} is {getattr(images, 'dtype', type(images))}: give an array of uint8 or uint16")
    if images.ndim == 4 and images.shape[3] <= 4 and images.shape[1] > 16:
        raise ValueError(f"{name} has shape {images.shape}, as if channels came last: give (N, C, H, W)")
    if images.ndim != 4 or 0 in images.shape[1:] or len(images) < least:
        raise ValueError(f"{name} has shape {images.shape}: give (N, C, H, W), N at least {least}")
