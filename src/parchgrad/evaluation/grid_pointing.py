"""The grid pointing game: mosaics of confidently classified images as a data set in which every class has its place.

Source: Bohle, Fritz, Schiele (2021), "Convolutional Dynamic Alignment Networks for Interpretable Classifications",
section 4.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from parchgrad.data.samples import Sample, Samples
from parchgrad.errors import InputError
from parchgrad.evaluation.localisation import draw_mosaics, mosaic
from parchgrad.layers import bare_model, check_evaluation_mode

__all__ = ["Mosaics", "make_mosaics"]


class Mosaics(Dataset[Sample]):
    """Mosaics of a data set's images; each gives as many items as it has cells, one for each of its classes.

    The mask of an item is the cell that shows its class, so that `mass_inside` is the score of the game; a map that
    knows nothing has one over the number of cells.

    Attributes:
        fingerprint: digest of the data and of which images stand where.
        categories: those of the data.

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
            data: the images, all of one size.
            drawn: indices into the data, shape (M, rows * columns), row by row.
            rows: number of rows of cells.
            columns: number of columns of cells.

        Raises:
            InputError: if there are not as many indices for each mosaic as cells.
        """
        if drawn.dim() != 2 or drawn.shape[1] != rows * columns:
            raise InputError(
                f"Indices of shape {tuple(drawn.shape)} do not fill mosaics of {rows} x {columns} cells; "
                f"give shape (M, {rows * columns})."
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
            # The items of a mosaic come one after the other.
            parts = [self._data[place] for place in self._drawn[which]]
            self._last = which, parts
        image = mosaic(torch.stack([part.image for part in parts]), rows=self._rows, columns=self._columns)[0]
        height, width = parts[0].image.shape[1:]
        row, column = divmod(cell, self._columns)
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
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
    """Draw mosaics of the images that a classifier is sure of.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        data: labelled images, all of one size.
        count: number of mosaics.
        rows: number of rows of cells.
        columns: number of columns of cells.
        confidence: least probability, for its own class, of an image that takes part.
        batch_size: images in one pass.
        seed: of the draw.

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
    probability, labels = [], []
    with torch.no_grad():
        for start in range(0, size, batch_size):
            samples = [data[index] for index in range(start, min(start + batch_size, size))]
            own = torch.tensor([sample.label for sample in samples])
            said = model(torch.stack([sample.image for sample in samples]).to(weight)).double().softmax(dim=1).cpu()
            probability.append(said.gather(1, own.unsqueeze(1)).squeeze(1))
            labels.append(own)
    drawn = draw_mosaics(
        torch.cat(probability), torch.cat(labels), count=count, cells=rows * columns, confidence=confidence, seed=seed
    )
    return Mosaics(data, drawn, rows=rows, columns=columns)
