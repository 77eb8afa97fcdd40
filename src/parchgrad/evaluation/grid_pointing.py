"""The grid pointing game: mosaics of confidently classified images, with one class per cell.

Source: Bohle, Fritz, Schiele (2021), "Convolutional Dynamic Alignment Networks for Interpretable Classifications",
section 4.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from parchgrad.core.layers import bare_model, check_evaluation_mode
from parchgrad.data.samples import Sample, Samples
from parchgrad.errors import InputError
from parchgrad.evaluation.localisation import draw_mosaics, mosaic
from parchgrad.explain.outputs import Logits

__all__ = ["Mosaics", "make_mosaics"]


class Mosaics(Dataset[Sample]):
    """Mosaics of a data set's images, with one item per cell.

    The mask of an item is the cell that shows its class, so `mass_inside` is the score of the game; by chance it is one
    over the number of cells.

    Attributes:
        fingerprint: digest of the data and the layout.
        categories: category names of the data.

    Example:
        >>> class Plain(Dataset):
        ...     categories, fingerprint = (), "four images"
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return Sample(image=torch.full((1, 1, 1), float(index)), label=10 + index, name=f"{index}")
        >>> found = Mosaics(Plain(), torch.tensor([[3, 0]]), rows=1, columns=2)[1]
        >>> found.image, found.label, found.mask
        (tensor([[[3., 0.]]]), 10, tensor([[False,  True]]))
    """

    def __init__(self, data: Samples, drawn: Tensor, *, rows: int, columns: int) -> None:
        """Lay out the images.

        Args:
            data: images of equal size.
            drawn: indices into the data, shape (M, rows * columns), row by row.
            rows: number of rows of cells.
            columns: number of columns of cells.

        Raises:
            InputError: if a mosaic does not have one index per cell.
        """
        if drawn.dim() != 2 or drawn.shape[1] != rows * columns:
            raise InputError(
                f"`drawn` has shape {tuple(drawn.shape)}, which does not fill mosaics of {rows} x {columns} cells. "
                f"Pass shape (M, {rows * columns})."
            )
        self._data, self._drawn, self._rows, self._columns = data, drawn.tolist(), rows, columns
        self._last: tuple[int, list[Sample]] = (-1, [])
        self.categories: tuple[str, ...] = data.categories
        described = f"{getattr(data, 'fingerprint', None)} {rows} x {columns} {self._drawn}"
        self.fingerprint = f"{len(self._drawn)} mosaics, {hashlib.sha256(described.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._drawn) * self._rows * self._columns

    def __getitem__(self, index: int) -> Sample:
        which, cell = divmod(range(len(self))[index], self._rows * self._columns)
        number, parts = self._last
        if number != which:
            # Cached, since the items of a mosaic are consecutive.
            parts = [self._data[place] for place in self._drawn[which]]
            self._last = which, parts
        image = mosaic(torch.stack([part.image for part in parts]), rows=self._rows, columns=self._columns)[0]
        height, width = parts[0].image.shape[1:]
        row, column = divmod(cell, self._columns)
        mask = torch.zeros(image.shape[1:], dtype=torch.bool, device=image.device)
        mask[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
        name = f"mosaic {which + 1}, cell {cell + 1}, {parts[cell].name}"
        return Sample(image=image, label=parts[cell].label, name=name, mask=mask, group=f"mosaic {which + 1}")


def make_mosaics(
    model: nn.Module,
    data: Samples,
    *,
    count: int,
    rows: int = 2,
    columns: int = 2,
    confidence: float = 0.9,
    batch_size: int = 32,
    seed: int = 0,
) -> Mosaics:
    """Build mosaics from images that the model classifies with confidence.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        data: labelled images of equal size.
        count: number of mosaics.
        rows: number of rows of cells.
        columns: number of columns of cells.
        confidence: minimum probability of an image's own class.
        batch_size: number of images per forward pass.
        seed: random seed.

    Raises:
        InputError: if there are not enough such images.
        ModelError: if the model is in training mode, or wrapped in DataParallel.

    Example:
        >>> class Plain(Dataset):
        ...     categories, fingerprint = (), "four images"
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return Sample(image=torch.eye(4)[index].reshape(1, 2, 2), label=index, name=f"{index}")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).eval()
        >>> _ = model[1].weight.data.copy_(9 * torch.eye(4)), model[1].bias.data.zero_()
        >>> len(make_mosaics(model, Plain(), count=1))
        4
    """
    model = bare_model(model)
    check_evaluation_mode(model)
    size = len(data)
    weight = next(model.parameters())
    logits, probability, labels = Logits(model, None), [], []
    with torch.no_grad():
        for start in range(0, size, batch_size):
            samples = [data[index] for index in range(start, min(start + batch_size, size))]
            if any(sample.label is None for sample in samples):
                raise InputError("Mosaics need labels. Sort the images into one folder per class.")
            own = torch.tensor([sample.label for sample in samples], device="cpu")
            said = logits(torch.stack([sample.image for sample in samples]).to(weight)).double().softmax(dim=1).cpu()
            probability.append(said.gather(1, own.unsqueeze(1)).squeeze(1))
            labels.append(own)
    drawn = draw_mosaics(
        torch.cat(probability), torch.cat(labels), count=count, cells=rows * columns, confidence=confidence, seed=seed
    )
    return Mosaics(data, drawn, rows=rows, columns=columns)
