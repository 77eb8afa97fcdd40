"""Combine ParchGrad with Captum methods, without telling ParchGrad the class.

    python examples/captum_composition.py

A cat and an espresso side by side form one image for EfficientNet-Lite0. Saliency, input times gradient, integrated
gradients and SmoothGrad (Captum's NoiseTunnel) explain both classes in one batch, each alone and in a
`with pg.ParchGrad(...)` block. The script prints the share of each map in the cell of its own class (chance 0.5), and
writes outputs/examples/captum_cat.png and captum_espresso.png.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from PIL import Image
from skimage import data
from torch import Tensor

import parchgrad as pg
from parchgrad.evaluation.localisation import cell_shares, mosaic
from parchgrad.visual import panel, save_figure

SAMPLES = 6
Attribute = Callable[[Tensor], Tensor]


def make_methods(model: torch.nn.Module, target: Tensor) -> dict[str, Attribute]:
    """Create Captum's methods, exactly as without ParchGrad."""
    steps = {"n_steps": SAMPLES, "internal_batch_size": SAMPLES}
    noise = {"nt_type": "smoothgrad", "nt_samples": SAMPLES, "nt_samples_batch_size": SAMPLES, "stdevs": 0.5}
    return {
        "Saliency": lambda x: Saliency(model).attribute(x, target=target),
        "InputXGradient": lambda x: InputXGradient(model).attribute(x, target=target),
        "IntegratedGradients": lambda x: IntegratedGradients(model).attribute(x, target=target, **steps),
        "NoiseTunnel": lambda x: NoiseTunnel(Saliency(model)).attribute(x, target=target, **noise),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain both classes with each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/examples"))
    out = parser.parse_args(arguments).out
    classifier = pg.load_model("efficientnet_lite0")
    model, names = classifier.model, ("tiger cat", "espresso")
    photographs = [classifier.preprocess(Image.fromarray(array)) for array in (data.cat(), data.coffee())]
    both = mosaic(torch.stack(photographs), rows=1, columns=2)
    inputs = both.expand(len(names), -1, -1, -1).clone().requires_grad_()
    target = torch.tensor([classifier.find_category(name) for name in names])

    maps: dict[str, Tensor] = {}
    print(f"{'share in its own cell':24}{'plain':>10}{'with ParchGrad':>16}")
    for name, attribute in make_methods(model, target).items():
        torch.manual_seed(0)
        plain = pg.heatmap(attribute(inputs).detach())
        torch.manual_seed(0)
        # ParchGrad reads the class of each row off the backward signal, even if the method expands the batch.
        with pg.ParchGrad(model):
            partitioned = pg.heatmap(attribute(inputs).detach())
        maps |= {name: plain, f"{name} + ParchGrad": partitioned}
        shares = [cell_shares(heat, rows=1, columns=2).diagonal().mean() for heat in (plain, partitioned)]
        print(f"{name:24}{shares[0]:10.2f}{shares[1]:16.2f}")
    picture = classifier.preprocess.picture(both[0])
    for row, name in enumerate(names):
        # One row per method: plain, and with ParchGrad.
        heats = [heat[row] for heat in maps.values()]
        columns = {"plain": heats[0::2], "with ParchGrad": heats[1::2]}
        path = out / f"captum_{name.split()[-1]}.png"
        save_figure(panel([picture] * len(heats[0::2]), columns, labels=list(maps)[0::2]), path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
