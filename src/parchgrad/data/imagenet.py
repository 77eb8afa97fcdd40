"""ImageNet's validation photographs with the bounding boxes of ILSVRC's localisation task."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from defusedxml import ElementTree
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from parchgrad.data.folders import PhotographFolder, find_files, match_classes
from parchgrad.data.geometry import find_placement, turn_boxes
from parchgrad.data.images import stored_frame
from parchgrad.data.samples import Sample
from parchgrad.errors import ImageError, SettingError, reason_of
from parchgrad.files import refuse_special

__all__ = ["BoxedFolder"]

# An annotation takes some hundred bytes for each object.
_LARGEST_ANNOTATION = 2**20


class BoxedFolder(Dataset[Sample]):
    """Photographs in class folders, each with the boxes of its class from the XML file of the same name.

    `a/b.JPEG` goes with `b.xml`, wherever below the folder of annotations that stands. Objects of another class than
    the photograph's own are checked and left out; an XML file without a photograph is left out unread, and counted.
    Boxes are carried through the preprocessing and clipped to what the network sees: shape (0, 4) where nothing of the
    objects is left. An annotation is read with its item, and all of them are by `fingerprint`.

    ILSVRC's coordinates count from 1 and include both ends; some of its boxes start at 0, which is read as 1. They are
    coordinates of the stored pixels, as its own tools know no EXIF orientation: where a photograph has one, the boxes
    are turned with it, unless only the turned photograph has the size that the annotation names.

    Attributes:
        categories: names of the classes.
        unannotated: number of photographs without an XML file, whose boxes are None.
        unused: number of XML files without a photograph.

    Source: Russakovsky et al. (2015), "ImageNet Large Scale Visual Recognition Challenge", section 3.2.

    Example:
        >>> import tempfile
        >>> from torchvision.transforms import ToTensor
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "n02").mkdir()
        ...     Image.new("RGB", (4, 3)).save(Path(folder, "n02", "val_1.JPEG"))
        ...     _ = Path(folder, "val_1.xml").write_text(
        ...         "<annotation><filename>val_1</filename><size><width>4</width><height>3</height></size>"
        ...         "<object><name>n02</name><bndbox><xmin>2</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox>"
        ...         "</object></annotation>")
        ...     photographs = BoxedFolder(folder, folder, ToTensor(), categories=["ray", "hen"], synsets=["n01", "n02"])
        ...     photographs[0].label, photographs[0].boxes
        (1, tensor([[1., 0., 3., 3.]]))
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        transform: Callable[[Image.Image], Tensor],
        *,
        categories: Sequence[str],
        synsets: Sequence[str],
        allow_unannotated: bool = False,
    ) -> None:
        """Join the photographs with the XML files by name.

        Args:
            root: folder with a folder of photographs for each class (see `match_classes`).
            annotations: folder of the XML files, flat or with folders in it.
            transform: turns a photograph into what the network takes: steps that `find_placement` knows.
            categories: names of the model's classes.
            synsets: WordNet ids of the model's classes, by which the XML files name them.
            allow_unannotated: whether a photograph may have no XML file.

        Raises:
            ImageError: if a folder is missing or empty, class folders do not tell the classes, a name stands twice, or
                a photograph has no XML file and `allow_unannotated` is off, or none has.
            SettingError: if the classes have no WordNet ids, or boxes cannot be carried through the transform.
        """
        if not categories or len(synsets) != len(categories):
            raise SettingError(
                f"There are {len(synsets)} WordNet ids for {len(categories)} classes, but each class needs its own; "
                "take a model of ImageNet's classes."
            )
        find_placement(transform, width=512, height=512)
        photographs = PhotographFolder(root, transform)
        self._photographs = photographs.with_classes(match_classes(photographs.folders, categories, synsets)[0])
        self._root, self._transform, self._synsets = Path(root), transform, tuple(synsets)
        self.categories = tuple(categories)
        xml_of = _by_stem(_xml_files(Path(annotations)))
        _by_stem(photographs.files)
        self._annotations = tuple(xml_of.get(file.stem) for file in photographs.files)
        self.unannotated = self._annotations.count(None)
        self.unused = len(xml_of) - (len(self) - self.unannotated)
        if self.unannotated == len(self):
            raise ImageError(
                f"None of the {len(xml_of)} XML files in {str(annotations)!r} has the name of a photograph in "
                f"{str(root)!r}; check both folders."
            )
        if self.unannotated and not allow_unannotated:
            first = photographs.files[self._annotations.index(None)]
            raise ImageError(
                f"{self.unannotated} photographs have no XML file, {str(first)!r} the first of them; add their files, "
                "or allow photographs without boxes with allow_unannotated=True."
            )

    @property
    def fingerprint(self) -> str:
        """Digest of the photographs (see `PhotographFolder.fingerprint`), the classes and the content of all XML files.

        Raises:
            ImageError: if a file cannot be read.
        """
        digest = hashlib.sha256(repr((self._photographs.fingerprint, self.categories, self._synsets)).encode())
        for path in self._annotations:
            content = b"" if path is None else _read_annotation(path)
            digest.update(f"{len(content)} ".encode() + content)
        return f"{len(self)} photographs with boxes, {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._photographs)

    def __getitem__(self, index: int) -> Sample:
        image, label = self._photographs[index]
        file, path = self._photographs.files[index], self._annotations[index]
        name = file.relative_to(self._root).as_posix()
        boxes = None if path is None else self._boxes(file, path, label)
        return Sample(image=image, label=label, name=name, boxes=boxes)

    def _boxes(self, file: Path, path: Path, label: int) -> Tensor:
        """The boxes of a photograph's own class, in pixels of the network's input."""
        boxes, named = _parse(path, self._synsets[label])
        width, height, orientation = stored_frame(file)
        turned = (height, width) if orientation >= 5 else (width, height)
        if named == (width, height):
            boxes = turn_boxes(boxes, orientation=orientation, width=width, height=height)
        elif named != turned:
            raise _wrong(
                path, f"is of a photograph of {named[0]} x {named[1]} pixels, but {str(file)!r} has {width} x {height}"
            )
        return find_placement(self._transform, width=turned[0], height=turned[1]).carry(boxes)


def _xml_files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise ImageError(f"There is no folder {str(folder)!r}; check the path.")
    found = find_files(folder, (".xml",))
    if not found:
        raise ImageError(f"The folder {str(folder)!r} holds no XML files; give the one with ILSVRC's annotations.")
    return found


def _by_stem(files: Sequence[Path]) -> dict[str, Path]:
    """Files by name without suffix, which must tell them apart."""
    found: dict[str, Path] = {}
    for file in files:
        other = found.setdefault(file.stem, file)
        if other is not file:
            raise ImageError(
                f"{str(other)!r} and {str(file)!r} have the same name, so that boxes cannot be told by it; "
                "remove one of them."
            )
    return found


def _wrong(path: Path, reason: str) -> ImageError:
    return ImageError(f"The annotation {str(path)!r} {reason}; replace it by the file of ILSVRC's own archive.")


def _read_annotation(path: Path) -> bytes:
    try:
        refuse_special(path)
        with path.open("rb") as file:
            content = file.read(_LARGEST_ANNOTATION + 1)
    except OSError as error:
        raise ImageError(f"{str(path)!r} cannot be read ({reason_of(error)}); check its permissions.") from error
    if len(content) > _LARGEST_ANNOTATION:
        raise _wrong(path, "is larger than a mebibyte")
    return content


def _parse(path: Path, synset: str) -> tuple[Tensor, tuple[int, int]]:
    """Boxes (N, 4) of one class, counted from 0 with the ends exclusive, and the size that the annotation names."""
    try:
        root = ElementTree.fromstring(_read_annotation(path), forbid_dtd=True)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        # Entity bombs and external entities come as a ValueError of defusedxml.
        raise _wrong(path, f"is no plain XML ({reason_of(error)})") from error
    named = _text(path, root, "filename")
    if named != path.stem:
        raise _wrong(path, f"says that it is of {named!r}, not of {path.stem!r}")
    size = _only(path, root, "size")
    width, height = _number(path, size, "width"), _number(path, size, "height")
    boxes = []
    for item in root.findall("object"):
        left, top, right, bottom = (
            _number(path, _only(path, item, "bndbox"), tag) for tag in ("xmin", "ymin", "xmax", "ymax")
        )
        if right < max(left, 1) or bottom < max(top, 1):
            raise _wrong(path, f"holds an empty box ({left}, {top}, {right}, {bottom})")
        if right > width or bottom > height:
            raise _wrong(path, f"holds a box outside of its photograph ({left}, {top}, {right}, {bottom})")
        if _text(path, item, "name") == synset:
            boxes.append((max(left - 1, 0), max(top - 1, 0), right, bottom))
    if not boxes:
        raise _wrong(path, f"holds no object of the class {synset} in whose folder the photograph is")
    return torch.tensor(boxes, dtype=torch.float32), (width, height)


def _only(path: Path, parent: Any, tag: str) -> Any:
    """The one child of this name."""
    found = parent.findall(tag)
    if len(found) != 1:
        raise _wrong(path, f"has {len(found)} elements <{tag}> in <{parent.tag}>, where one is needed")
    return found[0]


def _text(path: Path, parent: Any, tag: str) -> str:
    return (_only(path, parent, tag).text or "").strip()


def _number(path: Path, parent: Any, tag: str) -> int:
    text = _text(path, parent, tag)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _wrong(path, f"has {text[:40]!r} as <{tag}>, where a whole number is needed")
    return int(text)
