"""Train the small network that comes with the package for the generated shapes; under two minutes on two cores.

    python tools/train_shapes.py [--out FILE]

Training and test pictures differ by their seed. The file's metadata hold the settings and the accuracy on the test set.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import parchgrad
from parchgrad.data.samples import Sample
from parchgrad.data.shapes import GENERATOR_VERSION, SHAPE_CATEGORIES, GeneratedShapes
from parchgrad.files import writing
from parchgrad.models import SHAPES_MODEL
from parchgrad.shapes_network import ShapesNetwork

TARGET = Path(parchgrad.__file__).parent / "weights" / f"{SHAPES_MODEL}.safetensors"
TRAINING_SEED, TEST_SEED, NETWORK_SEED = 1, 2, 3
TRAINING_COUNT, TEST_COUNT = 12_000, 2_000
EPOCHS, BATCH = 5, 64
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 0.006, 0.02, 0.05


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures (N, 3, H, W) and classes (N,)."""
    loader = DataLoader(
        GeneratedShapes(count=count, seed=seed), batch_size=250, num_workers=torch.get_num_threads(), collate_fn=stack
    )
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def stack(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Stack some samples; half precision, which the levels of a picture need no more than, halves the memory."""
    return torch.stack([sample.image for sample in samples]).half(), torch.tensor([sample.label for sample in samples])


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror and turn a batch by quarters and swap its colour channels: no class becomes another."""
    mirrored, quarters = torch.randint(4, (2,), generator=generator).tolist()
    images = images.rot90(quarters, dims=(2, 3))
    images = images.flip(3) if mirrored % 2 else images
    return images[:, torch.randperm(3, generator=generator)]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train with AdamW, the learning rate rising and falling once."""
    generator = torch.Generator().manual_seed(NETWORK_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.25)
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for chosen in torch.split(order, BATCH)[: len(images) // BATCH]:
            batch = vary(images[chosen].float(), generator).contiguous(memory_format=torch.channels_last)
            loss = criterion(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * BATCH / len(images)
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {total:.3f}", flush=True)
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures whose class is found."""
    with torch.no_grad():
        found = torch.cat([model(part.float()).argmax(dim=1) for part in torch.split(images, 250)])
    return (found == labels).double().mean().item()


def main() -> None:
    """Draw, train, test, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(NETWORK_SEED)
    model = ShapesNetwork(len(SHAPE_CATEGORIES)).to(memory_format=torch.channels_last)
    images, labels = draw(TRAINING_COUNT, TRAINING_SEED)
    print(f"drawn after {time.monotonic() - start:.0f} s", flush=True)
    train(model, images, labels)
    reached = accuracy(model, *draw(TEST_COUNT, TEST_SEED))
    metadata = {
        "accuracy": f"{reached:.4f}",
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
                "label_smoothing": LABEL_SMOOTHING,
            }
        ),
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with writing(arguments.out) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    megabytes = arguments.out.stat().st_size / 1e6
    print(f"accuracy {reached:.4f}, {megabytes:.2f} MB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
