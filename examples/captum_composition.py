"""Put ParchGrad under methods of Captum, and see what it changes, without a word to ParchGrad about the class.

    python examples/captum_composition.py

Two photographs side by side, a cat and an espresso, are one picture for EfficientNet-Lite0. Both classes are explained
in one batch by Saliency, input times gradient, integrated gradients and SmoothGrad (Captum's NoiseTunnel), each as
Captum has it and again in a `with pg.ParchGrad(...)` block. Out come the shares of the maps in the cell of their own
class (chance 0.5), and pictures: outputs/examples/captum_cat.png and captum_espresso.png.
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
    """Captum's methods, set up as they would be without ParchGrad."""
    steps = {"n_steps": SAMPLES, "internal_batch_size": SAMPLES}
    noise = {"nt_type": "smoothgrad", "nt_samples": SAMPLES, "nt_samples_batch_size": SAMPLES, "stdevs": 0.5}
    return {
        "Saliency": lambda x: Saliency(model).attribute(x, target=target),
        "InputXGradient": lambda x: InputXGradient(model).attribute(x, target=target),
        "IntegratedGradients": lambda x: IntegratedGradients(model).attribute(x, target=target, **steps),
        "NoiseTunnel": lambda x: NoiseTunnel(Saliency(model)).attribute(x, target=target, **noise),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain both classes by each method."""
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
    print(f"{'share in its own cell':24}{'as it is':>10}{'with ParchGrad':>16}")
    for name, attribute in make_methods(model, target).items():
        torch.manual_seed(0)
        plain = pg.heatmap(attribute(inputs).detach())
        torch.manual_seed(0)
        # The class of each row is read off the backward signal, whatever batch expansion the method does.
        with pg.ParchGrad(model):
            partitioned = pg.heatmap(attribute(inputs).detach())
        maps |= {name: plain, f"{name} + ParchGrad": partitioned}
        shares = [cell_shares(heat, rows=1, columns=2).diagonal().mean() for heat in (plain, partitioned)]
        print(f"{name:24}{shares[0]:10.2f}{shares[1]:16.2f}")
    picture = classifier.preprocess.picture(both[0])
    for row, name in enumerate(names):
        # One row for each method: as it is, and with ParchGrad.
        heats = [heat[row] for heat in maps.values()]
        columns = {"as it is": heats[0::2], "with ParchGrad": heats[1::2]}
        path = out / f"captum_{name.split()[-1]}.png"
        save_figure(panel([picture] * len(heats[0::2]), columns, labels=list(maps)[0::2]), path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
