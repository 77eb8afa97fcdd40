"""ImageNet's validation images with the bounding boxes of ILSVRC's localisation task."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from parchgrad._io.extras import needs_extra
from parchgrad._io.files import refuse_special
from parchgrad.data.folders import PhotographFolder
from parchgrad.data.geometry import find_placement, turn_boxes
from parchgrad.data.images import find_files, stored_frame
from parchgrad.data.samples import Sample
from parchgrad.errors import ImageError, SettingError, reason_of

with needs_extra("evaluation"):
    from defusedxml import ElementTree

__all__ = ["BoxedFolder"]

# An annotation takes a few hundred bytes per object.
_LARGEST_ANNOTATION = 2**20


class BoxedFolder(Dataset[Sample]):
    """Images in class folders, each with the boxes of its class from the XML file of the same name.

    `a/b.JPEG` uses `b.xml`, anywhere below the folder of annotations. Objects of other classes than the image's are
    checked and left out; XML files without an image are counted but not read. Boxes are mapped through the
    preprocessing and clipped to the network's input: shape (0, 4) if no object is visible. Annotations are read with
    their item, and all of them by `fingerprint`.

    ILSVRC's coordinates count from 1 and include both ends; some boxes start at 0, which is read as 1. They refer to
    the stored pixels, since ILSVRC's tools ignore EXIF orientation. If an image has one, its boxes are rotated with
    it, unless only the rotated image matches the annotated size.

    Attributes:
        categories: names of the classes.
        unannotated: number of images without an XML file, whose boxes are None.
        unused: number of XML files without an image.

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
        """Match images and XML files by name.

        Args:
            root: folder with one folder of images per class (see `match_classes`).
            annotations: folder of the XML files, flat or nested.
            transform: turns an image into the network's input, with steps that `find_placement` supports.
            categories: names of the model's classes.
            synsets: WordNet ids of the model's classes, which the XML files use.
            allow_unannotated: whether images may lack an XML file.

        Raises:
            ImageError: if a folder is missing or empty, class folders do not match the classes, a name occurs twice,
                an image has no XML file and `allow_unannotated` is False, or none has.
            SettingError: if the classes have no WordNet ids, or boxes cannot be mapped through the transform.
        """
        if not categories or len(synsets) != len(categories):
            raise SettingError(
                f"There are {len(synsets)} WordNet ids for {len(categories)} classes, but each class needs one. "
                "Use a model with ImageNet's classes."
            )
        find_placement(transform, width=512, height=512)
        photographs = PhotographFolder(root, transform)
        self._photographs = photographs.with_categories(categories, synsets)
        self._root, self._transform, self._synsets = Path(root), transform, tuple(synsets)
        self.categories = tuple(categories)
        xml_of = _by_stem(_xml_files(Path(annotations)))
        _by_stem(photographs.files)
        self._annotations = tuple(xml_of.get(file.stem) for file in photographs.files)
        self.unannotated = self._annotations.count(None)
        self.unused = len(xml_of) - (len(self) - self.unannotated)
        if self.unannotated == len(self):
            raise ImageError(
                f"None of the {len(xml_of)} XML files in {str(annotations)!r} has the name of an image in "
                f"{str(root)!r}. Check both folders."
            )
        if self.unannotated and not allow_unannotated:
            first = photographs.files[self._annotations.index(None)]
            raise ImageError(
                f"{self.unannotated} images have no XML file, the first one is {str(first)!r}. Add the files, or pass "
                "`allow_unannotated=True`."
            )

    @property
    def fingerprint(self) -> str:
        """Digest of the images (see `PhotographFolder.fingerprint`), the classes and the content of all XML files.

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
        """Return the boxes of the image's class, in pixels of the network's input."""
        boxes, named = _parse(path, self._synsets[label])
        width, height, orientation = stored_frame(file)
        turned = (height, width) if orientation >= 5 else (width, height)
        if named == (width, height):
            boxes = turn_boxes(boxes, orientation=orientation, width=width, height=height)
        elif named != turned:
            raise _wrong(
                path, f"is for an image of {named[0]} x {named[1]} pixels, but {str(file)!r} has {width} x {height}"
            )
        return find_placement(self._transform, width=turned[0], height=turned[1]).carry(boxes)


def _xml_files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise ImageError(f"There is no folder {str(folder)!r}. Check the path.")
    found = find_files(folder, (".xml",))
    if not found:
        raise ImageError(f"The folder {str(folder)!r} contains no XML files. Pass the one with ILSVRC's annotations.")
    return found


def _by_stem(files: Sequence[Path]) -> dict[str, Path]:
    """Map names without suffix to files; names must be unique."""
    found: dict[str, Path] = {}
    for file in files:
        other = found.setdefault(file.stem, file)
        if other is not file:
            raise ImageError(
                f"{str(other)!r} and {str(file)!r} have the same name, so boxes cannot be matched by name. "
                "Remove one of them."
            )
    return found


def _wrong(path: Path, reason: str) -> ImageError:
    return ImageError(f"The annotation {str(path)!r} {reason}. Replace it with the file from ILSVRC's archive.")


def _read_annotation(path: Path) -> bytes:
    try:
        refuse_special(path)
        with path.open("rb") as file:
            content = file.read(_LARGEST_ANNOTATION + 1)
    except OSError as error:
        raise ImageError(f"Cannot read {str(path)!r} ({reason_of(error)}). Check its permissions.") from error
    if len(content) > _LARGEST_ANNOTATION:
        raise _wrong(path, "is larger than 1 MiB")
    return content


def _parse(path: Path, synset: str) -> tuple[Tensor, tuple[int, int]]:
    """Return boxes (N, 4) of one class, from 0 with exclusive ends, and the annotated image size."""
    try:
        root = ElementTree.fromstring(_read_annotation(path), forbid_dtd=True)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        # defusedxml raises ValueError for entity bombs and external entities.
        raise _wrong(path, f"is not plain XML ({reason_of(error)})") from error
    named = _text(path, root, "filename")
    if named != path.stem:
        raise _wrong(path, f"belongs to {named!r}, not to {path.stem!r}")
    size = _only(path, root, "size")
    width, height = _number(path, size, "width"), _number(path, size, "height")
    boxes = []
    for item in root.findall("object"):
        left, top, right, bottom = (
            _number(path, _only(path, item, "bndbox"), tag) for tag in ("xmin", "ymin", "xmax", "ymax")
        )
        if right < max(left, 1) or bottom < max(top, 1):
            raise _wrong(path, f"has an empty box ({left}, {top}, {right}, {bottom})")
        if right > width or bottom > height:
            raise _wrong(path, f"has a box outside of its image ({left}, {top}, {right}, {bottom})")
        if _text(path, item, "name") == synset:
            boxes.append((max(left - 1, 0), max(top - 1, 0), right, bottom))
    if not boxes:
        raise _wrong(path, f"has no object of class {synset}, in whose folder the image is")
    return torch.tensor(boxes, dtype=torch.float32, device="cpu"), (width, height)


def _only(path: Path, parent: Any, tag: str) -> Any:
    """Return the only child with this tag."""
    found = parent.findall(tag)
    if len(found) != 1:
        raise _wrong(path, f"has {len(found)} <{tag}> elements in <{parent.tag}> instead of one")
    return found[0]


def _text(path: Path, parent: Any, tag: str) -> str:
    return (_only(path, parent, tag).text or "").strip()


def _number(path: Path, parent: Any, tag: str) -> int:
    text = _text(path, parent, tag)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _wrong(path, f"has {text[:40]!r} as <{tag}>, which must be a whole number")
    return int(text)
