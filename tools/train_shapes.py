"""Train the small network for the generated shapes that comes with the package: three and a half minutes on one core.

    python tools/train_shapes.py [--out FILE]

After a first phase on single shapes, half of the batches are mosaics of four images, and sizes vary. The loss is binary
per class, so that a logit does not depend on what else is in the image.

Training and test images differ by their seed. The file's metadata contain the settings and the test scores. The weights
are reproducible on one machine with one number of threads; elsewhere rounding differs.
"""

import argparse
import json
import math
import time
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
from parchgrad.models.loading import SHAPES_MODEL
from parchgrad.models.shapes_network import ShapesNetwork

TARGET = Path(parchgrad.__file__).parent / "weights" / f"{SHAPES_MODEL}.safetensors"
TRAINING_SEED, TEST_SEED, NETWORK_SEED = 1, 2, 3
TRAINING_COUNT, TEST_COUNT = 12_000, 2_000
EPOCHS, BATCH = 4, 32
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 0.004, 0.25, 0.02
# Share of the training that uses single images only, and share of the later batches that are mosaics.
PLAIN, MOSAICS = 0.3, 0.5
SCALES = (0.75, 1.0, 1.0, 1.25)
# Target probabilities of classes that are absent and present.
ABSENT, PRESENT = 0.005, 0.98


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Generate images (N, 3, H, W) and classes (N,)."""
    loader = DataLoader(
        GeneratedShapes(count=count, seed=seed), batch_size=250, num_workers=torch.get_num_threads(), collate_fn=stack
    )
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def stack(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Stack samples in half precision, which is enough for image levels and halves the memory."""
    return torch.stack([sample.image for sample in samples]).half(), torch.tensor([sample.label for sample in samples])


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


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    generator = torch.Generator().manual_seed(NETWORK_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * batches, pct_start=WARM_UP
    )
    present = functional.one_hot(labels, len(SHAPE_CATEGORIES)).float()
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for step, chosen in enumerate(torch.split(order, BATCH)[:batches], start=epoch * batches):
            batch, target = vary(images[chosen].float(), generator), present[chosen]
            tiled, scale = torch.rand(2, generator=generator).tolist()
            if step >= PLAIN * EPOCHS * batches:
                batch = resize(batch, SCALES[int(scale * len(SCALES))])
                if tiled < MOSAICS:
                    batch, target = mosaics(batch), target.reshape(-1, 4, len(SHAPE_CATEGORIES)).amax(dim=1)
            logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = functional.binary_cross_entropy_with_logits(
                logits, target.clamp(ABSENT, PRESENT), reduction="sum"
            ) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / batches
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {total:.3f}", flush=True)
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Compute the share of images whose class is predicted."""
    return (logits_of(model, images).argmax(dim=1) == labels).double().mean().item()


def mosaic_recall(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Compute the share of the classes in mosaics of four images that are among the four highest logits."""
    found = logits_of(model, mosaics(images)).topk(4).indices
    return (found.unsqueeze(2) == labels.reshape(-1, 1, 4)).any(dim=1).double().mean().item()


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, K) of images in half precision."""
    with torch.no_grad():
        return torch.cat([model(part.float()) for part in torch.split(images, 100)])


def main() -> None:
    """Generate the images, train, test, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(NETWORK_SEED)
    model = ShapesNetwork(len(SHAPE_CATEGORIES))
    # Start with a probability of about one in ten per class, given the sum over 8 x 8 positions.
    nn.init.constant_(model.classifier.bias, -2 - math.log(64))
    model = model.to(memory_format=torch.channels_last)
    images, labels = draw(TRAINING_COUNT, TRAINING_SEED)
    print(f"images generated after {time.monotonic() - start:.0f} s", flush=True)
    train(model, images, labels)
    trained = time.monotonic() - start
    test_images, test_labels = draw(TEST_COUNT, TEST_SEED)
    reached, recalled = accuracy(model, test_images, test_labels), mosaic_recall(model, test_images, test_labels)
    metadata = {
        "accuracy": f"{reached:.4f}",
        "mosaic_recall": f"{recalled:.4f}",
        "generator_version": str(GENERATOR_VERSION),
        "categories": json.dumps(SHAPE_CATEGORIES),
        "training": json.dumps(
            {
                "pictures": GeneratedShapes(count=TRAINING_COUNT, seed=TRAINING_SEED).fingerprint,
                "test_pictures": GeneratedShapes(count=TEST_COUNT, seed=TEST_SEED).fingerprint,
                "network_seed": NETWORK_SEED,
                "epochs": EPOCHS,
                "batch": BATCH,
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "warm_up": WARM_UP,
                "plain": PLAIN,
                "mosaics": MOSAICS,
                "scales": SCALES,
                "absent": ABSENT,
                "present": PRESENT,
            }
        ),
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with writing(arguments.out) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    megabytes = arguments.out.stat().st_size / 1e6
    print(f"accuracy {reached:.4f}, mosaic recall {recalled:.4f}, {megabytes:.2f} MB, trained in {trained:.0f} s")


if __name__ == "__main__":
    main()
