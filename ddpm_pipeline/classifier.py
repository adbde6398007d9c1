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
import os
import uuid
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .features import Extractor, _digest, _digest_of_images


class _Network(nn.Module):
    """About 0.2 M parameters: 128 features, and a linear layer that tells classes by them."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for channels_in, channels_out in ((channels, 32), (32, 64), (64, 64)):
            blocks += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
            blocks += [nn.MaxPool2d(2, ceil_mode=True)]
        self.features = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU()
        )
        self.head = nn.Linear(128, classes)

    def extract(self, x: Tensor) -> Tensor:
        """(B, C, H, W), in [0, 1], to (B, 128); sides above 64 are averaged down, which bounds memory and time."""
        side = min(64, x.shape[2]), min(64, x.shape[3])
        features: Tensor = self.features(F.adaptive_avg_pool2d(2 * x - 1, side))
        return features


def _classifier(
    images: np.ndarray, labels: np.ndarray | None, cache_dir: Path | None, device: torch.device | str
) -> Extractor:
    if len(images) < 2:
        raise ValueError(f"images has {len(images)} image: the classifier needs one to learn and one to be tested")
    channels = images.shape[1]
    classes, answers, task = _task(images, labels)
    digest = _digest_of_images(
        "classifier" if labels is None else hashlib.sha256(answers.tobytes()).hexdigest(), images
    )
    path = None if cache_dir is None else cache_dir / f"classifier-{digest}.safetensors"
    tensors = None if path is None else _load(path)
    if tensors is None:
        tensors = _train(images, None if labels is None else answers, classes, device)
        if path is not None:
            _save(path, tensors)
    key = _digest(tensors)  # of what was learned, which another machine may round in another way
    accuracy, scale = tensors.pop("accuracy").item(), tensors.pop("scale").item()
    with torch.random.fork_rng(devices=[]):
        network = _Network(channels, classes)
    network.load_state_dict(tensors)
    network.to(device).eval()

    def compute(x: Tensor) -> Tensor:
        if x.shape[1] != channels:
            raise ValueError(f"images have {x.shape[1]} channels: the classifier was trained on {channels}")
        return network.extract(x) / scale  # so that x . y / D in the kernel's (x . y / D + 1)^3 is about 1

    return Extractor(f"classifier ({task}, {key[:8]})", key, compute, device=device, accuracy=accuracy)


def _task(images: np.ndarray, labels: np.ndarray | None) -> tuple[int, np.ndarray, str]:
    """How many classes, the class of each image, (N,) int64 (empty if that is how it is turned), and both in words."""
    if labels is None:
        turns = len(_turns(images.shape))
        return turns, np.zeros(0, dtype=np.int64), f"{turns} rotations"
    if np.shape(labels) != (len(images),):
        raise ValueError(f"labels have shape {np.shape(labels)}: give one for each of the {len(images)} images")
    names, answers = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all labels are {names[0]!r}: give at least 2 different ones")
    return len(names), answers.astype(np.int64), f"{len(names)} labels"


def _turns(shape: tuple[int, ...]) -> tuple[int, ...]:
    """By how many quarters pictures of this shape can be turned without a change of shape."""
    return (0, 1, 2, 3) if shape[-2] == shape[-1] else (0, 2)


@torch.enable_grad()
def _train(
    images: np.ndarray, answers: np.ndarray | None, classes: int, device: torch.device | str
) -> dict[str, Tensor]:
    """Weights of a _Network; its accuracy on every 20th image, which it is not trained on; the scale of its features.

    The scale is the root of their mean square on these images.
    """
    held_out = np.arange(0, len(images), 20)
    training = np.setdiff1d(np.arange(len(images)), held_out)
    steps = max(200, min(1500, 3 * len(training) // 128))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)  # torch.manual_seed would seed the devices as well
        network = _Network(images.shape[1], classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    turns = _turns(images.shape)

    def lesson(chosen: np.ndarray, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in [0, 1] and what to say of them. turn: (B,), an index into turns; not used if there are labels."""
        x = torch.from_numpy(images[chosen]).float() / np.iinfo(images.dtype).max
        if answers is not None:
            return x.to(device), torch.from_numpy(answers[chosen]).to(device)
        x = torch.stack([image.rot90(turns[t], (1, 2)) for image, t in zip(x, turn.tolist())])
        return x.to(device), turn.to(device)

    for _ in tqdm(range(steps), desc="training the classifier", unit=" steps", leave=False):
        chosen = training[torch.randint(len(training), (128,), generator=generator).numpy()]
        x, answer = lesson(chosen, torch.randint(len(turns), (128,), generator=generator))
        loss = F.cross_entropy(network.head(network.extract(x)), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    network.eval()
    right, asked, squares = 0, 0, []
    with torch.no_grad():
        for turn in range(1 if answers is not None else len(turns)):
            for start in range(0, len(held_out), 256):
                chosen = held_out[start : start + 256]
                x, answer = lesson(chosen, torch.full((len(chosen),), turn))
                features = network.extract(x)
                squares.append(features.square().flatten())
                right += int((network.head(features).argmax(dim=1) == answer).sum())
                asked += len(chosen)
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    scale = torch.cat(squares).double().mean().sqrt().cpu()
    return {**weights, "accuracy": torch.tensor(right / asked, dtype=torch.float64), "scale": scale}


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Written beside its place and renamed, so that under this name there is all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Tensor] | None:
    """What _save wrote; None if there is no file, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
            whole = (file.metadata() or {}).get("sha256") == _digest(tensors)
    except SafetensorError:
        return None
    return tensors if whole else None
