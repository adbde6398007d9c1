"""FEATURES: networks that turn images into feature vectors, which the distances in fidelity.py compare.

A distance belongs to its extractor: report the extractor's name with it, and compare only distances of one extractor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .classifier import train_classifier
from .fidelity import Kernel, cubic_kernel
from .image_arrays import check_images
from .pixels import num_levels
from .tensor_cache import FORMAT, hash_file, hash_images, load_tensors, save_tensors


class Extractor:
    """A function from images to feature vectors.

    Attributes:
        name: for reports, such as "pixels-16x16".
        key: hash of everything but the image that the features depend on; part of the names of cached files.
        frechet_name, kernel_name: what the distances are called in these features: "FID" and "KID" in those of
            Inception, "FD-DINOv2" in those of DINOv2, "CMMD" in those of CLIP.
        kernel: of the kernel distance.
        commit: of a model on the Hub; None for other extractors.
        accuracy: of the classifier on images that it was not trained on; None for other extractors.
    """

    def __init__(
        self,
        name: str,
        key: str,
        compute: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str = "cpu",
        frechet_name: str = "Frechet distance",
        kernel_name: str = "kernel distance",
        kernel: Kernel = cubic_kernel,
        commit: str | None = None,
        accuracy: float | None = None,
    ) -> None:
        self.name, self.key, self.commit, self.accuracy = name, key, commit, accuracy
        self.frechet_name, self.kernel_name, self.kernel = frechet_name, kernel_name, kernel
        self._compute, self._device = compute, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32 on the CPU, of images (B, C, H, W), uint8 or uint16, of any size.

        Raises:
            ValueError: another dtype or shape, or a number of channels that this extractor does not support.
        """
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.uint16):
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}: give (B, C, H, W) uint8 or uint16")
        return self.of_floats(images.float() / (num_levels(images.dtype) - 1))

    @torch.no_grad()
    def of_floats(self, x: Tensor) -> Tensor:
        """Features (B, D), float32 on the CPU, of images (B, C, H, W), float32 in [0, 1], which are not rounded."""
        features = self._compute(x.to(self._device)).float().cpu()
        if features.ndim != 2 or len(features) != len(x):
            shape = tuple(features.shape)
            raise ValueError(f"{self.name} returns {shape} for {len(x)} images: an extractor must return (B, D)")
        return features

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared difference of the features of two batches of images, (B, C, H, W) in [-1, 1]: (B,), on the CPU.

        `pipe.fuse(..., distance=extractor)` balances in it.
        """
        difference = self.of_floats((x.float() + 1) / 2) - self.of_floats((y.float() + 1) / 2)
        return difference.square().mean(dim=1)


def extract_features(
    extractor: Extractor, images: np.ndarray, *, cache_dir: Path | None = None, batch_size: int = 256
) -> Tensor:
    """Features of all images, (N, D) float32 on the CPU; read from `cache_dir` if they were computed before.

    Args:
        images: (N, C, H, W), uint8 or uint16; may be memory-mapped.
        cache_dir: created if missing. Files are named by a hash of extractor.key and of the pixels; a damaged file is
            replaced.
    Raises:
        ValueError: another dtype or shape, no images, or a batch_size below 1.
    """
    check_images("images", images)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: give an int of at least 1")
    path = None if cache_dir is None else cache_dir / f"features-{hash_images(extractor.key, images)}.safetensors"
    cached = None if path is None else load_tensors(path)
    if cached is not None:
        return cached["features"]
    batches = []
    with tqdm(
        total=len(images), desc=f"features, {extractor.name}", unit=" images", leave=False, disable=None
    ) as progress:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size]))
            batches.append(extractor(batch))
            progress.update(len(batch))
    features = torch.cat(batches)
    if path is not None:
        save_tensors(path, {"features": features})
    return features


def make_extractor(
    which: str,
    *,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor of this name or file.

    Args:
        which: "pixels": means of the pixels on a grid of at most 16 x 16 cells, in [-1, 1].
            "classifier": a small network that is trained here to predict the labels of the images or, without labels,
            how an image is rotated: see `classifier.train_classifier`.
            A .th file: the ResNet-56 for CIFAR-10 of github.com/akamaster/pytorch_resnet_cifar10; gray or RGB, resized
            to 32 x 32.
            A .pt file: TorchScript, called with images in [-1, 1]; or the Inception network for FID in its usual
            TorchScript form, gray or RGB.
            A folder, or a name on the Hub, "user/model" or "user/model@revision": a model of transformers, gray or RGB,
            as DINOv2 or CLIP: see hub_features.py.
        images: (N, C, H, W) uint8 or uint16, which the classifier is trained on. The grid of "pixels" is at most their
            size.
        labels: (N,), for the classifier.
        cache_dir: where the trained classifier is kept; created if missing.
    Raises:
        ValueError: another name, a file that is missing or is not what its suffix says, a model that cannot be loaded,
            or images and labels that the classifier cannot be trained on.
    """
    if images is not None:
        check_images("images", images)
    if which == "pixels":
        return _pixels(images)
    if which == "classifier":
        if images is None:
            raise ValueError("images is None: the classifier needs images to train on")
        classifier = train_classifier(images, labels, cache_dir=cache_dir, device=device)
        return Extractor(
            classifier.name, classifier.key, classifier.features, device=device, accuracy=classifier.accuracy
        )
    path = Path(which).expanduser()
    if is_model(which):
        from .hub_features import load_model  # only now: it imports transformers

        return load_model(which, device)
    if path.suffix not in (".th", ".pt"):
        raise ValueError(
            f'extractor is {which!r}: give "pixels", "classifier", the path of a .th or .pt file, or a model of '
            "transformers, as a folder or as user/model on the Hub"
        )
    if not path.is_file():
        raise ValueError(f"extractor is {which!r}, but this file does not exist")
    return _resnet(path, device) if path.suffix == ".th" else _torchscript(path, device)


def is_model(which: str) -> bool:
    """Whether this is a folder, or looks like a name on the Hub: "user/model" or "user/model@revision"."""
    path = Path(which).expanduser()
    if not which or path.suffix in (".th", ".pt"):
        return False
    return path.is_dir() or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]*)?", which) is not None


def _pixels(images: np.ndarray | None) -> Extractor:
    def compute(x: Tensor) -> Tensor:
        grid = min(16, x.shape[2]), min(16, x.shape[3])
        return F.adaptive_avg_pool2d(2 * x - 1, grid).flatten(1)

    height, width = (16, 16) if images is None else images.shape[2:]
    key = hashlib.sha256(f"pixels {FORMAT}".encode()).hexdigest()
    return Extractor(f"pixels-{min(16, height)}x{min(16, width)}", key, compute)


class _Block(nn.Module):
    """A residual block: where the size halves, the shortcut takes every second pixel and pads the channels with zeros.

    He et al. 2016, arXiv 1512.03385, section 4.2, option A. The layers have the names that they have in the file.
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
    """(B, 3, 32, 32) to the 64 pooled features, the input of its linear layer."""

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
    with torch.random.fork_rng(devices=[]):  # the initial weights are random numbers
        network = _ResNet56().eval()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except Exception as error:  # of many types: not a file of torch, other names, other shapes
        raise ValueError(f"{path} does not contain the ResNet-56 for CIFAR-10 ({type(error).__name__})") from None
    network.to(device)
    # The statistics of ImageNet, which this network was trained with, although on CIFAR-10.
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def compute(x: Tensor) -> Tensor:
        x = to_rgb(x)
        if x.shape[2:] != (32, 32):
            x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
        return network((x - mean) / std)

    return Extractor("cifar10-resnet56", hash_file("resnet", path), compute, device=device)


def _torchscript(path: Path, device: torch.device | str) -> Extractor:
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {error}") from error
    key = hash_file("torchscript", path)

    def inception(x: Tensor) -> Tensor:
        return network((to_rgb(x) * 255).round().to(torch.uint8), return_features=True)

    arguments = [argument.name for argument in network.forward.schema.arguments]
    if "Inception" in network.original_name and "return_features" in arguments:
        with torch.no_grad():
            features = inception(torch.zeros(1, 3, 32, 32, device=device))
        if features.shape == (1, 2048):
            return Extractor("inception", key, inception, device=device, frechet_name="FID", kernel_name="KID")
    return Extractor(path.name, key, lambda x: network(2 * x - 1), device=device)


def to_rgb(x: Tensor) -> Tensor:
    """Gray images repeated, (B, 3, H, W); ValueError: neither gray nor RGB."""
    if x.shape[1] not in (1, 3):
        raise ValueError(f"images have {x.shape[1]} channels: this extractor supports 1 or 3")
    return x.expand(-1, 3, -1, -1)
