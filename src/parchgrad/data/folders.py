"""Folders of images as data sets."""

import copy
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from parchgrad._io.checks import check_kind
from parchgrad._io.files import refuse_special, without_addresses
from parchgrad.data.images import IMAGE_SUFFIXES, cannot_read, find_files, read_image
from parchgrad.errors import ImageError
from parchgrad.statistics.batches import LeftOut

__all__ = ["PhotographFolder", "match_classes"]

# Files hashed to identify a folder.
_PROBES = 64


class PhotographFolder(Dataset[Any]):
    """The images below a folder, in sorted order: with one folder per class, or without classes.

    An item is the transformed image and its class; without classes, the image alone.

    Attributes:
        root: the folder.
        files: the image files.
        folders: names of the class folders, sorted; empty if an image lies outside of any.
        labels: class of each image; None without classes.
        classes: names of the model's classes; empty without `with_categories`.
        matched_by: how `with_categories` matched the folders: `"WordNet id"`, `"category"`, `"index"` or `"order"`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cat/a.png", "dog/b.png"):
        ...         Path(root, name).parent.mkdir()
        ...         Image.new("RGB", (4, 3)).save(Path(root, name))
        ...     photographs = PhotographFolder(root, lambda image: image.size).with_classes({"cat": 281, "dog": 207})
        ...     photographs.folders, photographs[1]
        (('cat', 'dog'), ((4, 3), 207))
    """

    def __init__(
        self, root: str | Path, transform: Callable[[Image.Image], Tensor], *, skip_unreadable: bool = False
    ) -> None:
        """Find all files with the suffix of an image format, except hidden files and folders.

        Args:
            root: the folder.
            transform: turns an image into the network's input.
            skip_unreadable: whether an unreadable image becomes a `LeftOut` item instead of an error.

        Raises:
            ImageError: if the folder does not exist, contains no images, or a folder in it cannot be read.
        """
        check_kind("`root`", root, (str, PathLike), "Pass one folder", error=ImageError, wanted="the path of a folder")
        self.root, self._transform, self._skip_unreadable = Path(root), transform, skip_unreadable
        if not os.path.isdir(self.root):
            raise ImageError(f"There is no folder {str(root)!r}. Check the path.")
        self.files = find_files(self.root, IMAGE_SUFFIXES)
        if not self.files:
            raise ImageError(f"The folder {str(root)!r} contains no images. Choose one with JPEG or PNG files.")
        parts = [file.relative_to(self.root).parts for file in self.files]
        self.folders = () if any(len(names) == 1 for names in parts) else tuple(sorted({names[0] for names in parts}))
        self.labels: tuple[int, ...] | None = None
        self.classes: tuple[str, ...] = ()
        self.matched_by = ""

    def with_categories(self, categories: Sequence[str], synsets: Sequence[str] = ()) -> "PhotographFolder":
        """Label the images by their class folder, whose name is matched to a model's classes; see `match_classes`.

        Args:
            categories: names of the model's classes.
            synsets: WordNet ids of the model's classes, if any.

        Raises:
            ImageError: if an image lies outside of class folders, or a folder matches no class.
        """
        if not self.folders:
            raise ImageError(
                f"{str(self.root)!r} contains images outside class folders. Sort them into one folder per class."
            )
        class_of, way = match_classes(self.folders, categories, synsets)
        labelled = self.with_classes(class_of)
        labelled.classes, labelled.matched_by = tuple(categories), way
        return labelled

    def with_classes(self, class_of: Mapping[str, int]) -> "PhotographFolder":
        """Label the images by their class folder.

        Raises:
            ImageError: if two class folders are the same because of a link, since each folder is read once.
        """
        places: dict[str, str] = {}
        # `folders` has only the first of them, under which the files were found.
        for name in sorted(entry.name for entry in os.scandir(self.root) if entry.name[0] != "." and entry.is_dir()):
            other = places.setdefault(os.path.realpath(self.root / name), name)
            if other != name:
                raise ImageError(
                    f"The class folders {other!r} and {name!r} in {str(self.root)!r} are the same. Remove the link."
                )
        labelled = copy.copy(self)
        labelled.labels = tuple(class_of[file.relative_to(self.root).parts[0]] for file in self.files)
        return labelled

    @property
    def fingerprint(self) -> str:
        """Digest of names, sizes, classes, transform, the content of 64 files and three transformed images.

        Raises:
            ImageError: if one of these files cannot be read.
        """
        digest = hashlib.sha256(without_addresses(str(self._transform)).encode())
        count = min(_PROBES, len(self))
        for index in range(count):
            digest.update(self._known(_content, self.files[index * (len(self) - 1) // max(1, count - 1)], b""))
        # Different transforms can have the same name.
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            seen = self._photograph(index)
            values = seen.cpu().numpy().tobytes() if isinstance(seen, Tensor) else seen
            # The reason contains the path, which must not affect the digest.
            values = None if isinstance(seen, LeftOut) else values
            digest.update(without_addresses(repr(values)).encode())
        for index, file in enumerate(self.files):
            label = None if self.labels is None else self.labels[index]
            name = os.fsencode(file.relative_to(self.root).as_posix())
            digest.update(name + f" {self._known(_size, file, None)} {label}\n".encode())
        return f"{len(self)} photographs, {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        photograph = self._photograph(index)
        if self.labels is None or isinstance(photograph, LeftOut):
            return photograph
        return photograph, self.labels[index]

    def _known(self, read: Callable[[Path], Any], file: Path, otherwise: Any) -> Any:
        """Read a file, or return `otherwise` if it is unreadable and may be skipped."""
        try:
            return read(file)
        except ImageError:
            if not self._skip_unreadable:
                raise
            return otherwise

    def _photograph(self, index: int) -> Any:
        try:
            return self._transform(read_image(self.files[index]))
        except ImageError as error:
            if not self._skip_unreadable:
                raise
            return LeftOut(str(error).rpartition(". ")[0])


def match_classes(
    folders: Sequence[str], categories: Sequence[str], synsets: Sequence[str] = ()
) -> tuple[dict[str, int], str]:
    """Match class folders to class indices.

    Folders are named by WordNet id, category or index, or match the number and order of the classes.

    Args:
        folders: names of the folders, sorted.
        categories: names of the model's classes.
        synsets: WordNet ids of the model's classes, if any.

    Returns:
        Class index by folder, and how it was found.

    Raises:
        ImageError: if none of these ways matches every folder.

    Example:
        >>> match_classes(["great_dane", "pug"], ["Pug", "Tabby", "Great Dane"])
        ({'great_dane': 2, 'pug': 0}, 'category')
    """
    ways: list[tuple[str, Mapping[str, int]]] = [
        ("WordNet id", _places(synsets)),
        ("category", _places(_plain(category) for category in categories)),
        ("index", {name: int(name) for name in folders if name.isdecimal() and int(name) < len(categories)}),
    ]
    for way, places in ways:
        found = {name: places.get(name, places.get(_plain(name), -1)) for name in folders}
        if folders and -1 not in found.values() and len(set(found.values())) == len(folders):
            return found, way
    known = {name for _, places in ways for name in places}
    strange = [name for name in folders if name not in known and _plain(name) not in known]
    # Trust the order only if no name contradicts it: class10 sorts before class2.
    numbered = any(name.isdecimal() for name in folders) or list(folders) != sorted(folders, key=_natural)
    if len(folders) == len(categories) == len(strange) and not numbered:
        return _places(folders), "order"
    why = "they mix naming schemes, or two name the same class"
    if strange:
        why = f"{strange[0]!r} is not a WordNet id, category or index"
    raise ImageError(
        f"The {len(folders)} class folders do not match the model's {len(categories)} classes ({why}). Rename the "
        "folders."
    )


def _content(file: Path) -> bytes:
    try:
        refuse_special(file)
        return file.read_bytes()
    except OSError as error:
        raise cannot_read(file, error) from error


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise cannot_read(file, error) from error


def _places(names: Iterable[str]) -> dict[str, int]:
    """Map the names that occur once to their index."""
    listed = list(names)
    counts = Counter(listed)
    return {name: index for index, name in enumerate(listed) if counts[name] == 1}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that orders numbers in names numerically."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _plain(name: str) -> str:
    """Normalise case and separators of a name."""
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())
