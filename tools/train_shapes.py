"""Train the small networks for the generated shapes that come with the package, in 4 to 13 minutes each on one core.

    python tools/train_shapes.py [NETWORK ...] [--out FOLDER]

The first phase uses single shapes only. Then half of the batches have several shapes: mosaics of four images in several
sizes for `shapes`, images with a rival for the other networks. The loss is binary per class, so that a logit does not
depend on what else is in the image.

Training and test images differ by their seed. The files' metadata contain the settings and the test scores. The weights
are reproducible on one machine with one number of threads; elsewhere rounding differs.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import parchgrad
from parchgrad._io.files import writing
from parchgrad.data.samples import Sample
from parchgrad.data.shapes import GENERATOR_VERSION, SHAPE_CATEGORIES, GeneratedShapes
from parchgrad.evaluation.localisation import mosaic
from parchgrad.models.shapes_networks import SHAPES_NETWORKS

FOLDER = Path(parchgrad.__file__).parent / "weights"
TRAINING_SEED, TEST_SEED, NETWORK_SEED = 1, 2, 3
TEST_COUNT = 2_000
# Target probabilities of classes that are absent and present.
ABSENT, PRESENT = 0.005, 0.98


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one network's training.

    Attributes:
        count: number of training images, and of those with a rival.
        epochs: number of passes over as many images.
        batch: images per batch.
        learning_rate: highest learning rate.
        weight_decay: AdamW's weight decay.
        warm_up: share of the steps before the highest learning rate.
        plain: share of the steps that use single shapes only.
        rivals: whether every second later batch has images with a rival.
        mosaics: share of the later batches that are mosaics.
        scales: factors by which later batches are resized, chosen at random.
        bias: initial bias of the logits.
        half: whether the file has weights in half precision.
    """

    count: int = 24_000
    epochs: int
    batch: int = 32
    learning_rate: float
    weight_decay: float
    warm_up: float = 0.25
    plain: float = 0.3
    rivals: bool = True
    mosaics: float = 0.0
    scales: tuple[float, ...] = (1.0,)
    bias: float = -2.0
    half: bool = True


RECIPES = {
    "shapes": Recipe(
        count=12_000,
        epochs=4,
        learning_rate=0.004,
        weight_decay=0.02,
        rivals=False,
        mosaics=0.5,
        scales=(0.75, 1.0, 1.0, 1.25),
        # A probability of about one in ten per class, given the sum over 8 x 8 positions.
        bias=-2 - math.log(64),
        half=False,
    ),
    "shapes_vit": Recipe(epochs=6, learning_rate=0.0015, weight_decay=0.05, warm_up=0.1),
    "shapes_convnext": Recipe(epochs=4, learning_rate=0.002, weight_decay=0.05, warm_up=0.1),
    "shapes_mobilenet": Recipe(epochs=4, learning_rate=0.004, weight_decay=0.02, warm_up=0.1),
}


@cache
def draw(count: int, seed: int, rivals: int) -> tuple[Tensor, Tensor]:
    """Generate images (N, 3, H, W) in half precision and the classes that are present (N, K)."""
    shapes = GeneratedShapes(count=count, seed=seed, rivals=rivals)
    loader = DataLoader(shapes, batch_size=250, num_workers=torch.get_num_threads(), collate_fn=stack)
    classes = torch.tensor([shapes.classes(index) for index in range(count)])
    return torch.cat(list(loader)), functional.one_hot(classes, len(SHAPE_CATEGORIES)).sum(dim=1).float()


def stack(samples: list[Sample]) -> Tensor:
    """Stack images in half precision, which is enough for image levels and halves the memory."""
    return torch.stack([sample.image for sample in samples]).half()


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip a batch, rotate it by quarter turns and permute its colour channels, which keeps the classes."""
    mirrored, quarters = torch.randint(4, (2,), generator=generator).tolist()
    images = images.rot90(quarters, dims=(2, 3))
    images = images.flip(3) if mirrored % 2 else images
    return images[:, torch.randperm(3, generator=generator)]


def resize(images: Tensor, scale: float) -> Tensor:
    """Resize a batch, so that shapes come in more sizes."""
    if scale == 1:
        return images
    return functional.interpolate(images, scale_factor=scale, mode="bilinear", antialias=scale < 1)


def mosaics(images: Tensor) -> Tensor:
    """Tile groups of four images (4 N, C, H, W) into mosaics (N, C, 2 H, 2 W)."""
    return torch.cat([mosaic(four, rows=2, columns=2) for four in torch.split(images, 4)])


def unite(present: Tensor) -> Tensor:
    """Unite the classes of groups of four images (4 N, K), as `mosaics` tiles them."""
    return present.reshape(-1, 4, len(SHAPE_CATEGORIES)).amax(dim=1)


def build(network: str) -> nn.Module:
    """Initialise a network."""
    torch.manual_seed(NETWORK_SEED)
    model = SHAPES_NETWORKS[network](len(SHAPE_CATEGORIES))
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    nn.init.constant_(last.bias, RECIPES[network].bias)
    return model.to(memory_format=torch.channels_last)


def train(model: nn.Module, recipe: Recipe) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    sets = [draw(recipe.count, TRAINING_SEED, rivals) for rivals in range(1 + recipe.rivals)]
    generator = torch.Generator().manual_seed(NETWORK_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batches = recipe.count // recipe.batch
    steps = recipe.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, pct_start=recipe.warm_up
    )
    model.train()
    for epoch in range(recipe.epochs):
        total = 0.0
        order = torch.randperm(recipe.count, generator=generator)
        for step, chosen in enumerate(torch.split(order, recipe.batch)[:batches], start=epoch * batches):
            later = step >= recipe.plain * steps
            images, present = sets[step % len(sets) if later else 0]
            batch, target = vary(images[chosen].float(), generator), present[chosen]
            tiled, scale = torch.rand(2, generator=generator).tolist()
            if later:
                batch = resize(batch, recipe.scales[int(scale * len(recipe.scales))])
                if tiled < recipe.mosaics:
                    batch, target = mosaics(batch), unite(target)
            logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = functional.binary_cross_entropy_with_logits(
                logits, target.clamp(ABSENT, PRESENT), reduction="sum"
            ) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / batches
        print(f"epoch {epoch + 1} of {recipe.epochs}: loss {total:.3f}", flush=True)
    model.eval()


def test(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Compute the accuracy, and the recall on images with several shapes."""
    images, present = draw(TEST_COUNT, TEST_SEED, rivals=0)
    scores = {
        "accuracy": recall(model, images, present),
        "rival_recall": recall(model, *draw(TEST_COUNT, TEST_SEED, rivals=1)),
    }
    if recipe.mosaics:
        scores["mosaic_recall"] = recall(model, mosaics(images), unite(present))
    return scores


def recall(model: nn.Module, images: Tensor, present: Tensor) -> float:
    """Compute the share of the present classes that are among as many highest logits."""
    order = logits_of(model, images).argsort(dim=1, descending=True)
    counts = present.sum(dim=1, keepdim=True)
    found = present.gather(1, order) * (torch.arange(present.shape[1]) < counts)
    return (found.sum() / present.sum()).item()


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, K) of images in half precision."""
    with torch.no_grad():
        return torch.cat([model(part.float()) for part in torch.split(images, 100)])


def save(model: nn.Module, network: str, scores: dict[str, float], path: Path) -> None:
    """Save the weights with the settings and scores."""
    recipe = RECIPES[network]
    settings = {
        "pictures": [
            GeneratedShapes(count=recipe.count, seed=TRAINING_SEED, rivals=rivals).fingerprint
            for rivals in range(1 + recipe.rivals)
        ],
        "test_pictures": GeneratedShapes(count=TEST_COUNT, seed=TEST_SEED).fingerprint,
        "network_seed": NETWORK_SEED,
        **asdict(recipe),
        "absent": ABSENT,
        "present": PRESENT,
    }
    metadata = {
        **{name: f"{value:.4f}" for name, value in scores.items()},
        "generator_version": str(GENERATOR_VERSION),
        "categories": json.dumps(SHAPE_CATEGORIES),
        "training": json.dumps(settings),
    }
    with writing(path) as temporary:
        save_file(stored(model, recipe), temporary, metadata=metadata)


def stored(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Return the tensors of the file."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return {
        name: tensor.half() if recipe.half and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def main() -> None:
    """Generate the images, train, test, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=list(RECIPES), help=", ".join(RECIPES))
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER")
    arguments = parser.parse_args()
    for network in arguments.networks:
        if network not in RECIPES:
            parser.error(f"NETWORK is {network!r}, but it must be one of {', '.join(RECIPES)}.")
    for network in arguments.networks:
        start = time.monotonic()
        model, recipe = build(network), RECIPES[network]
        train(model, recipe)
        trained = time.monotonic() - start
        # The scores are of the weights as stored.
        model.load_state_dict(stored(model, recipe))
        scores, path = test(model, recipe), arguments.out / f"{network}.safetensors"
        save(model, network, scores, path)
        reached = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"{network}: {reached}, {path.stat().st_size / 1e6:.2f} MB, trained in {trained:.0f} s", flush=True)


if __name__ == "__main__":
    main()
