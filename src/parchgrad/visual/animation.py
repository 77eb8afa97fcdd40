"""Animations: a sweep as a moving picture, its maps cross-fading from value to value."""

import io
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from parchgrad.checks import check_whole_number
from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.files import writing
from parchgrad.visual.maps import paint, relative, shared_top
from parchgrad.visual.sweeps import Sweep

__all__ = ["FORMATS", "Animation", "animate", "check_format", "save_animation"]

FORMATS = (".gif", ".webp", ".mp4")
"""Suffixes of the files that can be written; the last needs ffmpeg."""
MOST_BYTES = 500_000
"""What a README's picture may weigh."""

_HELD = 900
_FADING = 90
_PAPER = (255, 255, 255)
_INK = (29, 29, 34)
_GAP = 8
# Pixels that a caption needs, also of a narrower panel.
_ROOM = 64
# Side of a square panel in pixels, tried from the largest until the file is small enough.
_SIZES = (240, 224, 208, 192, 176, 160, 144, 128, 112, 96)
_COLOURS = 96


@dataclass(frozen=True, eq=False, kw_only=True)
class Animation:
    """A moving picture.

    Attributes:
        frames: pictures of one size, each (H, W, 3), 8 bits.
        durations: how long each is shown, in milliseconds.
        photograph: rows and columns of the panel that shows the photograph and never changes; the others show maps.
    """

    frames: tuple[NDArray[np.uint8], ...]
    durations: tuple[int, ...]
    photograph: tuple[slice, slice]


def animate(sweeps: Mapping[str, Sweep], *, panel_size: int = 224, fading_frames: int = 2) -> Animation:
    """Lay an image, its plain map and the maps of sweeps side by side, moving through the values in a loop.

    Between two values each map fades into the next, the last into the first; all maps share one scale.

    Args:
        sweeps: by the titles of their panels; of one image, method and class, over the same values of one setting.
        panel_size: side of a square panel in pixels, at least 32; others have its area.
        fading_frames: frames between two values, a whole number from 0 on.

    Returns:
        The animation; played in a loop it does not jump.

    Raises:
        InputError: if there is no sweep, or they do not belong together.
        SettingError: if a setting is out of range.

    Example:
        >>> import parchgrad as pg
        >>> from parchgrad.visual.sweeps import quantile_sweep
        >>> shapes, image = pg.load_model("shapes"), Image.new("RGB", (64, 64), "grey")
        >>> found = quantile_sweep(shapes, image, quantiles=(0.5, 0.1))
        >>> moving = animate({"ParchGrad": found}, panel_size=64)
        >>> len(moving.frames), moving.frames[0].shape
        (6, (102, 224, 3))
    """
    first = _check_together(sweeps)
    for name, value, lowest in (("panel_size", panel_size, 32), ("fading_frames", fading_frames, 0)):
        check_whole_number(name, value, lowest)
    size = _panel_shape(first.picture, panel_size)
    picture = _resized_picture(first.picture, size)
    top = shared_top([first.plain, *(heat for sweep in sweeps.values() for heat in sweep.heats)])

    def drawn(values: NDArray[Any]) -> NDArray[np.uint8]:
        scaled = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BOX))
        return _bytes(paint(picture, np.clip(scaled / top, 0, 1)))

    multiples = [[relative(heat) for heat in sweep.heats] for sweep in sweeps.values()]
    still = [_bytes(picture), drawn(relative(first.plain))]
    label = f"{first.target.category} ({first.target.probability:.0%})"
    titles = [label, f"{first.method.replace('_', ' ')}, plain", *sweeps]
    frames, durations = [], []
    places = range(len(first.values))
    for place, following in zip(places, [*places[1:], 0], strict=True):
        captions = [sweep.titles()[place] for sweep in sweeps.values()]
        for step in range(fading_frames + 1 if following != place else 1):
            share = step / (fading_frames + 1)
            panels = still + [drawn((1 - share) * maps[place] + share * maps[following]) for maps in multiples]
            frames.append(_compose(panels, titles, ["", f"yellow: {top:.0f} x the mean", *captions]))
            durations.append(_FADING if step else _HELD)
    _, line = _letters_and_line(size[0])
    left = _left_of(0, size[0])
    photograph = (slice(line, line + size[1]), slice(left, left + size[0]))
    return Animation(frames=tuple(frames), durations=tuple(durations), photograph=photograph)


def check_format(path: str | Path) -> None:
    """Check that a moving picture can be written under this name, before anything is computed for it.

    Raises:
        OutputError: if the suffix names none of the formats, or ffmpeg is needed and missing.

    Example:
        >>> check_format("sweep.gif")
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise OutputError(f"{str(path)!r} names no moving picture that can be written; end it in {', '.join(FORMATS)}.")
    if suffix == ".mp4":
        _find_ffmpeg()


def save_animation(
    sweeps: Mapping[str, Sweep],
    path: str | Path,
    *,
    most_bytes: int = MOST_BYTES,
    fading_frames: int = 2,
    force: bool = True,
) -> Animation:
    """Write sweeps as a moving picture: as large as fits into a number of bytes.

    Args:
        sweeps: see `animate`.
        path: ends in .gif, .webp or .mp4; the last needs ffmpeg.
        most_bytes: what the file may weigh, positive.
        fading_frames: see `animate`.
        force: whether an earlier file of that name is replaced.

    Returns:
        What was written.

    Raises:
        OutputError: if the suffix names none of the formats, ffmpeg is needed and missing, the file exists and `force`
            is off or cannot be written, or even the smallest panels weigh too much.
        InputError: if the sweeps do not belong together.
        SettingError: if a setting is out of range.

    Example:
        >>> import tempfile
        >>> import parchgrad as pg
        >>> from parchgrad.visual.sweeps import quantile_sweep
        >>> shapes, image = pg.load_model("shapes"), Image.new("RGB", (64, 64), "grey")
        >>> found = quantile_sweep(shapes, image, quantiles=(0.5, 0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_animation({"ParchGrad": found}, Path(folder, "sweep.gif"), most_bytes=100_000)
        ...     Path(folder, "sweep.gif").stat().st_size <= 100_000
        True
    """
    path = Path(path)
    check_format(path)
    # Put so that NaN fails too.
    if not most_bytes > 0:
        raise SettingError(f"most_bytes is {most_bytes}, but it must be a positive number.")
    encode = {".gif": _gif, ".webp": _webp, ".mp4": _mp4}[path.suffix.lower()]
    size = _SIZES[0]
    while True:
        moving = animate(sweeps, panel_size=size, fading_frames=fading_frames)
        content = encode(moving)
        if len(content) <= most_bytes:
            break
        if size == _SIZES[-1]:
            raise OutputError(
                f"{str(path)!r} would weigh {len(content):,} bytes at the smallest panels, more than {most_bytes:,}; "
                "sweep over fewer values, or allow more bytes."
            )
        size = _next_size(size, most_bytes / len(content))
    with writing(path, force=force) as temporary:
        temporary.write_bytes(content)
    return moving


def _next_size(size: int, share: float) -> int:
    """The largest smaller size that may weigh this share; small panels weigh more for their area, never less."""
    fitting = [smaller for smaller in _SIZES if smaller < size and smaller <= size * math.sqrt(share)]
    return max(fitting, default=_SIZES[-1])


def _check_together(sweeps: Mapping[str, Sweep]) -> Sweep:
    if not sweeps:
        raise InputError("`sweeps` is empty. Pass at least one sweep.")
    first, *others = sweeps.values()
    for other in others:
        if (other.setting, other.values, other.target.index) != (first.setting, first.values, first.target.index):
            raise InputError(
                "The sweeps are not over the same values of one setting and class; make them with equal settings."
            )
        if other.method != first.method:
            raise InputError(
                f"The sweeps are of the methods {first.method} and {other.method}, but beside them stands one plain "
                "map; make them with one method."
            )
        if not np.array_equal(other.picture, first.picture):
            raise InputError("The sweeps are of different photographs; animate each photograph by itself.")
    return first


def _compose(panels: Sequence[NDArray[np.uint8]], titles: Sequence[str], captions: Sequence[str]) -> NDArray[np.uint8]:
    """Panels side by side on white paper, titles above and captions below."""
    height, width = panels[0].shape[:2]
    letters, line = _letters_and_line(width)
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), letters)
    paper = Image.new("RGB", (_GAP + len(panels) * (max(width, _ROOM) + _GAP), height + 2 * line + _GAP), _PAPER)
    pen = ImageDraw.Draw(paper)
    for place, (panel, title, caption) in enumerate(zip(panels, titles, captions, strict=True)):
        left = _left_of(place, width)
        paper.paste(Image.fromarray(panel), (left, line))
        for text, top in ((title, line / 2), (caption, line * 1.5 + height)):
            pen.text(
                (left + width / 2, top), _fitting(text, font, max(width, _ROOM)), fill=_INK, font=font, anchor="mm"
            )
    return np.asarray(paper)


def _letters_and_line(width: int) -> tuple[int, int]:
    """Size of the letters and height of a line, in pixels, for panels of a width."""
    letters = max(9, round(width / 16))
    return letters, round(letters * 1.7)


def _left_of(place: int, width: int) -> int:
    """First column of a panel, in the middle of its room."""
    room = max(width, _ROOM)
    return _GAP + place * (room + _GAP) + (room - width) // 2


def _panel_shape(picture: NDArray[Any], side: int) -> tuple[int, int]:
    """Width and height of the area of a square panel, in the proportions of the picture."""
    height, width = picture.shape[:2]
    ratio = math.sqrt(width / height)
    return max(1, round(side * ratio)), max(1, round(side / ratio))


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut where it would run into the next panel."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _resized_picture(picture: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    resized = Image.fromarray(_bytes(picture)).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.float64) / 255


def _bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    return levels


def _gif(moving: Animation) -> bytes:
    # One palette for all frames, or still panels would flicker; of frames from all over the sweep.
    sample = np.concatenate(moving.frames[:: max(1, len(moving.frames) // 4)])
    palette = _with_paper(Image.fromarray(sample).quantize(_COLOURS, method=Image.Quantize.MEDIANCUT))
    # Dither hides the steps between colours, but weighs too much where maps move. Maps are compared: none has it, and
    # equal pixels of any two are equal in the file.
    photograph = Image.fromarray(moving.frames[0][moving.photograph])
    dithered = np.asarray(photograph.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    frames = []
    for frame in moving.frames:
        levels = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        levels[moving.photograph] = dithered
        indexed = Image.fromarray(levels)
        indexed.putpalette(palette.getpalette() or [])
        frames.append(indexed)
    return _encode(frames, moving, "GIF", optimize=False)


def _with_paper(palette: Image.Image) -> Image.Image:
    """The palette with the paper's colour in place of those near it, which Pillow's coarse search would prefer."""
    # Beyond these a palette is filled up with greys that are never used.
    colours = np.array(palette.getpalette()).reshape(-1, 3)[:_COLOURS]
    distance = np.abs(colours - np.array(_PAPER)).sum(axis=1)
    colours[(distance <= 24) | (distance == distance.min())] = _PAPER
    changed = Image.new("P", (1, 1))
    changed.putpalette(colours.ravel().tolist())
    return changed


def _webp(moving: Animation) -> bytes:
    return _encode([Image.fromarray(frame) for frame in moving.frames], moving, "WEBP", quality=75, method=4)


def _encode(frames: Sequence[Image.Image], moving: Animation, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, form, save_all=True, append_images=others, duration=list(moving.durations), loop=0, **options)
    return buffer.getvalue()


def _mp4(moving: Animation) -> bytes:
    program = _find_ffmpeg()
    # The format asks for even sides, and players for a constant rate.
    height, width = (length - length % 2 for length in moving.frames[0].shape[:2])
    repeated = [
        frame[:height, :width].tobytes()
        for frame, duration in zip(moving.frames, moving.durations, strict=True)
        for _ in range(round(duration / _FADING))
    ]
    command = [
        *(program, "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
        *("-framerate", str(1000 / _FADING), "-i", "-", "-pix_fmt", "yuv420p", "-movflags", "frag_keyframe+empty_moov"),
        *("-f", "mp4", "-"),
    ]
    done = subprocess.run(command, input=b"".join(repeated), capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise OutputError(f"ffmpeg could not write the animation ({reason[0]}); write a .gif instead.")
    return done.stdout


def _find_ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        raise OutputError("An .mp4 needs the program ffmpeg, which is not installed; install it, or write a .gif.")
    return program
