"""Train the small networks for the generated shapes that come with the package, in 4 to 15 minutes each on one core.

    python tools/train_shapes.py [NETWORK ...] [--out FOLDER]

For classifiers, the first phase uses single shapes only. Then half of the batches have several shapes: mosaics of four
images in several sizes for `shapes`, images with a rival for the others. The loss is binary per class, so that a logit
does not depend on what else is in the image.

The segmenter and the detector start from the features of `shapes`, and see images with no rival, one and two from the
start. They learn from maps of labels, from which the detector's boxes are computed.

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
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import batched_nms, box_iou, distance_box_iou_loss

import parchgrad
from parchgrad._io.files import writing
from parchgrad.data.samples import Sample
from parchgrad.data.shapes import GENERATOR_VERSION, SHAPE_CATEGORIES, GeneratedShapes
from parchgrad.evaluation.localisation import mosaic
from parchgrad.models.dense_networks import DENSE_NETWORKS, ShapesDetections, ShapesDetector, ShapesSegmenter
from parchgrad.models.loading import load_model
from parchgrad.models.shapes_networks import SHAPES_NETWORKS

FOLDER = Path(parchgrad.__file__).parent / "weights"
TRAINING_SEED, NETWORK_SEED = 1, 3
TEST_COUNT = 2_000
# Target probabilities of classes that are absent and present.
ABSENT, PRESENT = 0.005, 0.98
BACKGROUND = len(SHAPE_CATEGORIES)
# A detection counts from this probability and this overlap with the shape's box.
PROBABLE, OVERLAP = 0.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one network's training.

    Attributes:
        task: what the network does.
        seed: random seed of the training images; the test images have the next one.
        count: number of training images, and of those with each number of rivals.
        epochs: number of passes over as many images.
        batch: images per batch.
        learning_rate: highest learning rate.
        weight_decay: AdamW's weight decay.
        warm_up: share of the steps before the highest learning rate.
        plain: share of the steps that use single shapes only.
        rivals: largest number of rivals; later batches take turns from none to as many.
        mosaics: share of the later batches that are mosaics.
        scales: factors by which later batches are resized, chosen at random.
        bias: initial bias of the logits.
        half: whether the file has weights in half precision.
    """

    task: Literal["classify", "segment", "detect"] = "classify"
    seed: int = TRAINING_SEED
    count: int = 24_000
    epochs: int
    batch: int = 32
    learning_rate: float
    weight_decay: float
    warm_up: float = 0.25
    plain: float = 0.3
    rivals: int = 1
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
        rivals=0,
        mosaics=0.5,
        scales=(0.75, 1.0, 1.0, 1.25),
        # A probability of about one in ten per class, given the sum over 8 x 8 positions.
        bias=-2 - math.log(64),
        half=False,
    ),
    "shapes_vit": Recipe(epochs=6, learning_rate=0.0015, weight_decay=0.05, warm_up=0.1),
    "shapes_convnext": Recipe(epochs=4, learning_rate=0.002, weight_decay=0.05, warm_up=0.1),
    "shapes_mobilenet": Recipe(epochs=4, learning_rate=0.004, weight_decay=0.02, warm_up=0.1),
    "shapes_segmenter": Recipe(
        task="segment",
        seed=21,
        count=8_000,
        epochs=6,
        learning_rate=0.002,
        weight_decay=0.02,
        warm_up=0.1,
        plain=0.0,
        rivals=2,
    ),
    "shapes_detector": Recipe(
        task="detect",
        seed=21,
        count=8_000,
        epochs=10,
        learning_rate=0.002,
        weight_decay=0.02,
        warm_up=0.1,
        plain=0.0,
        rivals=2,
    ),
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


@dataclass(frozen=True)
class LabelMaps(Dataset[Tensor]):
    """The class of each pixel of generated shapes, `BACKGROUND` outside of them; bytes (H, W)."""

    shapes: GeneratedShapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Tensor:
        masks, classes = self.shapes.masks(index), torch.tensor(self.shapes.classes(index))
        labels = (masks * (classes - BACKGROUND)[:, None, None]).sum(dim=0) + BACKGROUND
        return labels.to(torch.uint8)


@cache
def draw_labels(count: int, seed: int, rivals: int) -> Tensor:
    """Generate the label maps (N, H, W) of the images of `draw`."""
    maps = LabelMaps(GeneratedShapes(count=count, seed=seed, rivals=rivals))
    return torch.cat(list(DataLoader(maps, batch_size=250, num_workers=torch.get_num_threads())))


def pictures(recipe: Recipe, count: int, seed: int, rivals: int) -> tuple[Tensor, Tensor]:
    """Generate images and what the network is to learn of them: the classes (N, K), or label maps (N, H, W)."""
    images, present = draw(count, seed, rivals)
    return images, present if recipe.task == "classify" else draw_labels(count, seed, rivals)


def vary(images: Tensor, generator: torch.Generator, *labels: Tensor) -> list[Tensor]:
    """Flip a batch, rotate it by quarter turns and permute its colour channels, which keeps the classes.

    Label maps (N, H, W) of the batch are flipped and rotated as well.
    """
    mirrored, quarters = torch.randint(4, (2,), generator=generator).tolist()
    moved = [each.rot90(quarters, dims=(-2, -1)) for each in (images, *labels)]
    moved = [each.flip(-1) if mirrored % 2 else each for each in moved]
    return [moved[0][:, torch.randperm(3, generator=generator)], *moved[1:]]


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
    recipe = RECIPES[network]
    model = {**SHAPES_NETWORKS, **DENSE_NETWORKS}[network](len(SHAPE_CATEGORIES))
    if isinstance(model, ShapesSegmenter | ShapesDetector):
        model.features.load_state_dict(load_model("shapes").model.features.state_dict())
    if recipe.task != "segment":
        *_, last = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
        nn.init.constant_(last.bias, recipe.bias)
    return model.to(memory_format=torch.channels_last)


def train(model: nn.Module, recipe: Recipe) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    sets = [pictures(recipe, recipe.count, recipe.seed, rivals) for rivals in range(1 + recipe.rivals)]
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
            images, targets = sets[step % len(sets) if later else 0]
            batch, target = images[chosen].float(), targets[chosen]
            if recipe.task == "classify":
                (batch,) = vary(batch, generator)
            else:
                batch, target = vary(batch, generator, target)
            tiled, scale = torch.rand(2, generator=generator).tolist()
            if later:
                batch = resize(batch, recipe.scales[int(scale * len(recipe.scales))])
                if tiled < recipe.mosaics:
                    batch, target = mosaics(batch), unite(target)
            output = model(batch.contiguous(memory_format=torch.channels_last))
            if recipe.task == "segment":
                loss = functional.cross_entropy(output, target.long())
            elif recipe.task == "detect":
                loss = detection_loss(output, *boxes_in(target))
            else:
                loss = functional.binary_cross_entropy_with_logits(
                    output, target.clamp(ABSENT, PRESENT), reduction="sum"
                ) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / batches
        print(f"epoch {epoch + 1} of {recipe.epochs}: loss {total:.3f}", flush=True)
    model.eval()


def boxes_in(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find the boxes x1, y1, x2, y2 of all classes in label maps (N, H, W), and which classes are present.

    Returns:
        Boxes (N, K, 4) and flags (N, K).
    """
    masks = functional.one_hot(labels.long(), BACKGROUND + 1)[..., :BACKGROUND].permute(0, 3, 1, 2)
    across, down = masks.amax(dim=2), masks.amax(dim=3)
    starts = [line.argmax(dim=2) for line in (across, down)]
    ends = [line.shape[2] - line.flip(2).argmax(dim=2) for line in (across, down)]
    return torch.stack([*starts, *ends], dim=2).float(), across.any(dim=2)


def detection_loss(found: ShapesDetections, boxes: Tensor, present: Tensor) -> Tensor:
    """Compute the loss per shape, at the positions within a stride of a box's centre.

    Args:
        found: the network's output.
        boxes: boxes of all classes (N, K, 4).
        present: which of them are in the image (N, K).
    """
    stride = ShapesDetector.stride
    side = math.isqrt(found.boxes.shape[1])
    places = stride * (torch.arange(side) + 0.5)
    cells = torch.cartesian_prod(places, places).flip(1)
    middles = (boxes[..., :2] + boxes[..., 2:]) / 2
    distances = (cells[None, None] - middles[:, :, None]).abs().amax(dim=3)
    nearest, which = distances.masked_fill(~present[:, :, None], math.inf).min(dim=1)
    is_shape = nearest < stride
    target = functional.one_hot(which, BACKGROUND) * is_shape[..., None]
    classes = functional.binary_cross_entropy_with_logits(found.logits, target.float(), reduction="sum")
    wanted = boxes.gather(1, which[..., None].expand(-1, -1, 4))
    overlaps = distance_box_iou_loss(found.boxes[is_shape], wanted[is_shape], reduction="sum")
    return (classes + 2 * overlaps) / is_shape.sum()


def test(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Compute the scores on images of the next seed, by task and number of rivals."""
    sets = [pictures(recipe, TEST_COUNT, recipe.seed + 1, rivals) for rivals in range(max(1, recipe.rivals) + 1)]
    if recipe.task == "segment":
        return {f"iou_{rivals}_rivals": mean_iou(model, *each) for rivals, each in enumerate(sets)}
    if recipe.task == "detect":
        return {
            f"{name}_{rivals}_rivals": value
            for rivals, each in enumerate(sets)
            for name, value in zip(("found", "right"), detected(model, *each), strict=True)
        }
    images, present = sets[0]
    scores = {"accuracy": recall(model, images, present), "rival_recall": recall(model, *sets[1])}
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


def mean_iou(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Compute the intersection over union of each class over all images, averaged over the classes of shapes."""
    common, either = torch.zeros(BACKGROUND), torch.zeros(BACKGROUND)
    for part, truth in zip(torch.split(images, 100), torch.split(labels, 100), strict=True):
        with torch.no_grad():
            guess = model(part.float()).argmax(dim=1)
        for index in range(BACKGROUND):
            own, seen = truth == index, guess == index
            common[index] += (own & seen).sum()
            either[index] += (own | seen).sum()
    return (common / either).mean().item()


def detected(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Compute the share of the shapes that are found, and the share of the detections that are right."""
    shapes = found = detections = right = 0
    for part, truth in zip(torch.split(images, 100), torch.split(labels, 100), strict=True):
        with torch.no_grad():
            output = model(part.float())
        for boxes, logits, own, present in zip(*output, *boxes_in(truth), strict=True):
            scores, classes = logits.sigmoid().max(dim=1)
            likely = scores >= PROBABLE
            boxes, scores, classes = boxes[likely], scores[likely], classes[likely]
            kept = batched_nms(boxes, scores, classes, OVERLAP)
            hits = box_iou(own, boxes[kept]) >= OVERLAP
            hits &= present[:, None] & (torch.arange(BACKGROUND)[:, None] == classes[kept])
            shapes, found = shapes + int(present.sum()), found + int(hits.any(dim=1).sum())
            detections, right = detections + len(kept), right + int(hits.any(dim=0).sum())
    return found / shapes, right / max(1, detections)


def save(model: nn.Module, network: str, scores: dict[str, float], path: Path) -> None:
    """Save the weights with the settings and scores."""
    recipe = RECIPES[network]
    settings = {
        "pictures": [
            GeneratedShapes(count=recipe.count, seed=recipe.seed, rivals=rivals).fingerprint
            for rivals in range(1 + recipe.rivals)
        ],
        "test_pictures": GeneratedShapes(count=TEST_COUNT, seed=recipe.seed + 1).fingerprint,
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
