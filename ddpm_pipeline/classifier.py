"""THE CLASSIFIER: a small network, trained on a data set in a minute or two, whose features measure distances.

With labels it learns to predict them; without, by how much an image is rotated (Gidaris et al. 2018, arXiv 1803.07728).
Its features exist for any data set, also where no pretrained network is suitable.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .pixels import num_levels
from .tensor_cache import hash_images, hash_tensors, load_tensors, save_tensors

BATCH_SIZE, TEST_BATCH_SIZE = 128, 256
LEAST_STEPS, MOST_STEPS = 200, 1500
HELD_OUT_EVERY = 20  # the accuracy is that on images 0, 20, 40, ..., which are not trained on


class ClassifierNetwork(nn.Module):
    """Three convolutions, 128 features and a linear layer: about 0.2 M parameters, for images of any size."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for channels_in, channels_out in ((channels, 32), (32, 64), (64, 64)):
            blocks += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
            blocks += [nn.MaxPool2d(2, ceil_mode=True)]
        # The names of both attributes are in cached files and their hashes.
        self.features = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU()
        )
        self.head = nn.Linear(128, num_classes)

    def extract(self, x: Tensor) -> Tensor:
        """Features (B, 128) of images (B, C, H, W) in [0, 1]. Sides above 64 are averaged down to 64 pixels."""
        features: Tensor = self.features(self.resized(x))
        return features

    def resized(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], at most 64 x 64, which bounds memory and time, of images in [0, 1]."""
        return F.adaptive_avg_pool2d(2 * x - 1, (min(64, x.shape[2]), min(64, x.shape[3])))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        logits: Tensor = self.head(self.extract(x))
        return logits


@dataclass(frozen=True)
class Classifier:
    """A trained network, in evaluation mode.

    Args:
        network: on the device that it was trained for.
        classes: what the logits stand for, in their order: the labels, or the number of quarter turns.
        task: "10 labels" or "4 rotations".
        accuracy: on the images that it was not trained on.
        feature_scale: root mean square of the features on these images.
        key: SHA-256 of the trained weights, which differ from one processor to another by rounding.
    """

    network: ClassifierNetwork
    classes: np.ndarray
    task: str
    accuracy: float
    feature_scale: float
    key: str

    @property
    def name(self) -> str:
        return f"classifier ({self.task}, {self.key[:8]})"

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features (B, 128) with root mean square 1, of images (B, C, H, W) in [0, 1].

        With this scale x . y / D in the kernel (x . y / D + 1)^3 of `fidelity.kernel_distance` is about 1.

        Raises:
            ValueError: a number of channels that the network was not trained on.
        """
        channels = self.network.features[0].in_channels
        if x.shape[1] != channels:
            raise ValueError(f"images have {x.shape[1]} channels: the classifier was trained on {channels}")
        return self.network.extract(x) / self.feature_scale

    @torch.no_grad()
    def layers(self, x: Tensor) -> list[Tensor]:
        """What each layer sees in images (B, C, H, W) in [0, 1]: means of its channels, and last the features."""
        x, layers = self.network.resized(x.to(self.network.head.weight.device)), []
        for module in self.network.features:
            x = module(x)
            if isinstance(module, nn.ReLU):
                layers.append(x.mean(dim=(2, 3)) if x.ndim == 4 else x)
        return layers

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Predicted probability of each class, (B, num_classes), of images (B, C, H, W) in [0, 1]."""
        probabilities: Tensor = self.network(x).softmax(dim=1)
        return probabilities

    def predict(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The predicted class of each image, (N,), from `classes`, and its probability, (N,).

        Args:
            images: (N, C, H, W), uint8 or uint16.
        """
        device = self.network.head.weight.device
        x = torch.from_numpy(images).float() / (num_levels(images.dtype) - 1)
        probabilities = torch.cat([self.probabilities(batch.to(device)).cpu() for batch in x.split(TEST_BATCH_SIZE)])
        confidence, index = probabilities.max(dim=1)
        return self.classes[index.numpy()], confidence.numpy()


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a classifier on these images, or load it from `cache_dir` if it was trained on the same ones before.

    The global random state is neither used nor changed.

    Args:
        images: (N, C, H, W), uint8 or uint16; may be memory-mapped.
        labels: (N,) numbers or strings; None: the network learns to predict rotations.
        cache_dir: created if missing. A damaged file is replaced.
    Raises:
        ValueError: fewer than 2 images, labels of another length, or labels that are all equal.
    """
    if len(images) < 2:
        raise ValueError(f"the number of images is {len(images)}: give at least 2, one to train on and one to test on")
    classes, targets, task = _task(images, labels)
    kind = "classifier" if targets is None else hashlib.sha256(targets.tobytes()).hexdigest()
    path = None if cache_dir is None else cache_dir / f"classifier-{hash_images(kind, images)}.safetensors"
    tensors = None if path is None else load_tensors(path)
    if tensors is None:
        tensors = _train(images, targets, len(classes), device)
        if path is not None:
            save_tensors(path, tensors)
    key = hash_tensors(tensors)
    accuracy, scale = tensors.pop("accuracy").item(), tensors.pop("scale").item()
    with torch.random.fork_rng(devices=[]):  # the initial weights are random numbers
        network = ClassifierNetwork(images.shape[1], len(classes))
    network.load_state_dict(tensors)
    return Classifier(network.to(device).eval(), classes, task, accuracy, scale, key)


def _task(images: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Classes, target index of each image, (N,) int64 (None for rotations), and the name of the task."""
    if labels is None:
        turns = _quarter_turns(images.shape)
        return np.array(turns), None, f"{len(turns)} rotations"
    if np.shape(labels) != (len(images),):
        raise ValueError(f"labels have shape {np.shape(labels)}: give one for each of the {len(images)} images")
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all labels are {classes[0]!r}: give at least 2 different ones")
    return classes, targets.astype(np.int64), f"{len(classes)} labels"


def _quarter_turns(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The rotations, in quarter turns, that keep the shape of an image (..., H, W)."""
    return (0, 1, 2, 3) if shape[-2] == shape[-1] else (0, 2)


@torch.enable_grad()
def _train(
    images: np.ndarray, targets: np.ndarray | None, num_classes: int, device: torch.device | str
) -> dict[str, Tensor]:
    """Weights of a ClassifierNetwork, and on held-out images its "accuracy" and "scale", the RMS of the features."""
    held_out = np.arange(0, len(images), HELD_OUT_EVERY)
    train_indices = np.setdiff1d(np.arange(len(images)), held_out)
    steps = max(LEAST_STEPS, min(MOST_STEPS, 3 * len(train_indices) // BATCH_SIZE))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)  # torch.manual_seed would seed the devices as well
        network = ClassifierNetwork(images.shape[1], num_classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    turns = _quarter_turns(images.shape)

    def batch(indices: np.ndarray, turn_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and their targets. turn_indices, (B,), index `turns` and are unused if there are labels."""
        x = torch.from_numpy(images[indices]).float() / (num_levels(images.dtype) - 1)
        if targets is not None:
            return x.to(device), torch.from_numpy(targets[indices]).to(device)
        x = torch.stack([image.rot90(turns[i], (1, 2)) for image, i in zip(x, turn_indices.tolist())])
        return x.to(device), turn_indices.to(device)

    for _ in tqdm(range(steps), desc="training the classifier", unit=" steps", leave=False, disable=None):
        indices = train_indices[torch.randint(len(train_indices), (BATCH_SIZE,), generator=generator).numpy()]
        x, target = batch(indices, torch.randint(len(turns), (BATCH_SIZE,), generator=generator))
        loss = F.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    network.eval()
    num_correct, num_tested, squares = 0, 0, []
    with torch.no_grad():
        for turn_index in range(1 if targets is not None else len(turns)):
            for start in range(0, len(held_out), TEST_BATCH_SIZE):
                indices = held_out[start : start + TEST_BATCH_SIZE]
                x, target = batch(indices, torch.full((len(indices),), turn_index))
                features = network.extract(x)
                squares.append(features.square().flatten())
                num_correct += int((network.head(features).argmax(dim=1) == target).sum())
                num_tested += len(indices)
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    scale = torch.cat(squares).cpu().double().mean().sqrt()
    return {**weights, "accuracy": torch.tensor(num_correct / num_tested, dtype=torch.float64), "scale": scale}
