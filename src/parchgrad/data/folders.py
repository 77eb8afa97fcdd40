"""Folders of photographs as data sets."""

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

from parchgrad.checks import check_kind
from parchgrad.data.images import read_image
from parchgrad.errors import ImageError, reason_of
from parchgrad.files import refuse_special, without_addresses
from parchgrad.statistics.collect import LeftOut

__all__ = ["PHOTOGRAPH_SUFFIXES", "PhotographFolder", "find_files", "match_classes"]

PHOTOGRAPH_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".jp2",
)
"""Endings of the files that count as photographs."""

# Files whose content tells the folder from another.
_PROBES = 64


class PhotographFolder(Dataset[Any]):
    """The photographs below a folder, in sorted order: with a folder for each class, or without classes.

    An item is the transformed photograph and its class; without classes, the photograph alone.

    Attributes:
        root: the folder.
        files: the photographs.
        folders: names of the class folders, sorted; empty where a photograph stands outside of any.
        labels: class of each photograph; None without classes.

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
        """Find the photographs: every file with the suffix of an image format, hidden ones and folders left out.

        Args:
            root: the folder.
            transform: turns a photograph into what a network takes.
            skip_unreadable: whether the item of a photograph that cannot be read is a `LeftOut`, not an error.

        Raises:
            ImageError: if there is no such folder, or no photograph in it, or a folder in it may not be read.
        """
        check_kind("root", root, (str, PathLike), "give one folder", error=ImageError, wanted="the path of a folder")
        self.root, self._transform, self._skip_unreadable = Path(root), transform, skip_unreadable
        if not os.path.isdir(self.root):
            raise ImageError(f"There is no folder {str(root)!r}; check the path.")
        self.files = find_files(self.root, PHOTOGRAPH_SUFFIXES)
        if not self.files:
            raise ImageError(f"The folder {str(root)!r} holds no photographs; give one with JPEG or PNG files.")
        parts = [file.relative_to(self.root).parts for file in self.files]
        self.folders = () if any(len(names) == 1 for names in parts) else tuple(sorted({names[0] for names in parts}))
        self.labels: tuple[int, ...] | None = None

    def with_classes(self, class_of: Mapping[str, int]) -> "PhotographFolder":
        """The same photographs, labelled by the class of the folder that they are in.

        Raises:
            ImageError: if two class folders are one, by way of a link: it is looked into once.
        """
        places: dict[str, str] = {}
        # The second of them is none of `folders`, since its files were found in the first.
        for name in sorted(entry.name for entry in os.scandir(self.root) if entry.name[0] != "." and entry.is_dir()):
            other = places.setdefault(os.path.realpath(self.root / name), name)
            if other != name:
                raise ImageError(
                    f"The class folders {other!r} and {name!r} in {str(self.root)!r} are one folder; remove the link."
                )
        labelled = copy.copy(self)
        labelled.labels = tuple(class_of[file.relative_to(self.root).parts[0]] for file in self.files)
        return labelled

    @property
    def fingerprint(self) -> str:
        """Digest of names, sizes, classes, transform, the content of 64 files and three transformed photographs.

        Another one means other data.

        Raises:
            ImageError: if one of these files cannot be read.
        """
        digest = hashlib.sha256(without_addresses(str(self._transform)).encode())
        count = min(_PROBES, len(self))
        for index in range(count):
            digest.update(self._known(_content, self.files[index * (len(self) - 1) // max(1, count - 1)], b""))
        # What a transform does, its name may not tell.
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            seen = self._photograph(index)
            values = seen.cpu().numpy().tobytes() if isinstance(seen, Tensor) else seen
            # Why it cannot be read says where it stands, which is not to count.
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
        """What is read of a file, or this in place of it where files may be unreadable."""
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
            return LeftOut(str(error).rpartition("; ")[0])


def match_classes(
    folders: Sequence[str], categories: Sequence[str], synsets: Sequence[str] = ()
) -> tuple[dict[str, int], str]:
    """Find the class that each class folder stands for.

    Folders are named by WordNet id, by category, by index, or are as many as the classes and in their order.

    Args:
        folders: names of the folders, sorted.
        categories: names of the model's classes.
        synsets: WordNet ids of the model's classes, where it has them.

    Returns:
        Class index by folder, and by what it was found.

    Raises:
        ImageError: if none of these ways leads to all classes.

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
    # Order is trusted only where no name says otherwise: class10 is sorted before class2.
    numbered = any(name.isdecimal() for name in folders) or list(folders) != sorted(folders, key=_natural)
    if len(folders) == len(categories) == len(strange) and not numbered:
        return _places(folders), "order"
    why = "they mix ways of naming, or two are one class"
    if strange:
        why = f"{strange[0]!r} is none by WordNet id, category or index"
    raise ImageError(
        f"The {len(folders)} class folders do not tell the model's {len(categories)} classes ({why}); rename the "
        "folders, or use predicted labels, which need none."
    )


def _content(file: Path) -> bytes:
    try:
        refuse_special(file)
        return file.read_bytes()
    except OSError as error:
        raise _cannot_read(file, error) from error


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _cannot_read(file, error) from error


def _cannot_read(place: str | Path, error: OSError) -> ImageError:
    return ImageError(f"{str(place)!r} cannot be read ({reason_of(error)}); check its permissions.")


def find_files(root: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """Find the files below a folder that end with one of the suffixes (lower case), sorted.

    Hidden files and folders are left out. Links are followed, but every folder is looked into once: where it stands,
    or else by the first of the links to it.

    Raises:
        ImageError: if a folder may not be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("b.xml", "a.XML", ".hidden.xml", "notes.txt"):
        ...         Path(root, name).touch()
        ...     [file.name for file in find_files(Path(root), (".xml",))]
        ['a.XML', 'b.xml']
    """
    found: list[Path] = []
    seen = set[str]()

    def stop(error: OSError) -> None:
        # What a folder holds that may not be read would be missing silently.
        raise _cannot_read(error.filename, error) from error

    waiting = [str(root)]
    while waiting:
        links = []
        for folder, inner, names in os.walk(waiting.pop(0), onerror=stop):
            place = os.path.realpath(folder)
            inner[:] = [] if place in seen else [name for name in inner if name[0] != "."]
            if place not in seen:
                found += [Path(folder, name) for name in names if name[0] != "." and name.lower().endswith(suffixes)]
            seen.add(place)
            links += [path for path in (os.path.join(folder, name) for name in inner) if os.path.islink(path)]
        waiting += sorted(links)
    return tuple(sorted(found))


def _places(names: Iterable[str]) -> dict[str, int]:
    """Index by name, for the names that stand there once."""
    listed = list(names)
    counts = Counter(listed)
    return {name: index for index, name in enumerate(listed) if counts[name] == 1}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts the numbers in names as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _plain(name: str) -> str:
    """A name as folders spell it, whatever the case."""
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())
