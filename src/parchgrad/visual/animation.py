"""Animations of sweeps: the maps cross-fade from value to value."""

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

from parchgrad._io.checks import check_whole_number
from parchgrad._io.files import writing
from parchgrad._io.images import to_bytes
from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.visual.maps import COLOUR_MAP, normalise, paint, shared_top
from parchgrad.visual.maps import smooth as smooth_map
from parchgrad.visual.sweeps import Sweep

__all__ = ["FORMATS", "Animation", "animate", "check_format", "save_animation"]

FORMATS = (".gif", ".webp", ".mp4")
"""Supported suffixes; .mp4 needs ffmpeg."""
MOST_BYTES = 1_500_000
"""Default size limit in bytes, small enough for a README."""

_HELD = 900
_FADING = 90
_PAPER = (255, 255, 255)
_INK = (29, 29, 34)
_GAP = 8
# Minimum width of a caption in pixels, even under a narrower panel.
_ROOM = 64
# Sides of a square panel in pixels, tried from the largest until the file is small enough.
_SIZES = (240, 224, 208, 192, 176, 160, 144, 128, 112, 96)
_COLOURS = 96


@dataclass(frozen=True, eq=False, kw_only=True)
class Animation:
    """An animation.

    Attributes:
        frames: frames of equal size, each (H, W, 3), 8 bits.
        durations: duration of each frame in milliseconds.
        image_area: rows and columns of the panel that shows the unchanging image; the other panels show maps.
    """

    frames: tuple[NDArray[np.uint8], ...]
    durations: tuple[int, ...]
    image_area: tuple[slice, slice]


def animate(
    sweeps: Mapping[str, Sweep],
    *,
    panel_size: int = 240,
    fading_frames: int = 2,
    shared_scale: bool = False,
    smooth: float = 0.0,
    colormap: str = COLOUR_MAP,
) -> Animation:
    """Animate sweeps in a loop, next to the image and its plain map.

    Each map fades into the next, and the last into the first.

    Args:
        sweeps: sweeps by panel title, all with the same image, method, class, setting and values.
        panel_size: side of a square panel in pixels, at least 32; other panels have the same area.
        fading_frames: number of frames between two values, at least 0.
        shared_scale: whether all maps share one scale; see `panel`.
        smooth: see `panel`.
        colormap: see `blend`.

    Returns:
        The animation; it loops without a jump.

    Raises:
        InputError: if `sweeps` is empty, or the sweeps do not match.
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
    plain, *heats = (smooth_map(heat, smooth) for heat in (first.plain, *(h for s in sweeps.values() for h in s.heats)))
    top = shared_top([plain, *heats]) if shared_scale else None

    def drawn(values: NDArray[Any]) -> NDArray[np.uint8]:
        scaled = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BOX))
        return to_bytes(paint(picture, np.clip(scaled, 0, 1), colormap=colormap))

    scaled = [normalise(heat, top=top) for heat in heats]
    by_sweep = [scaled[start : start + len(first.values)] for start in range(0, len(scaled), len(first.values))]
    still = [to_bytes(picture), drawn(normalise(plain, top=top))]
    title, _, other = first.label.partition("\n")
    titles = [title, first.plain_title, *sweeps]
    scale = "all maps on one scale" if shared_scale else "each map on its own scale"
    frames, durations = [], []
    places = range(len(first.values))
    for place, following in zip(places, [*places[1:], 0], strict=True):
        captions = [sweep.titles()[place] for sweep in sweeps.values()]
        for step in range(fading_frames + 1 if following != place else 1):
            share = step / (fading_frames + 1)
            panels = still + [drawn((1 - share) * maps[place] + share * maps[following]) for maps in by_sweep]
            frames.append(_compose(panels, titles, [other, scale, *captions]))
            durations.append(_FADING if step else _HELD)
    _, line = _letters_and_line(size[0])
    left = _left_of(0, size[0])
    image_area = (slice(line, line + size[1]), slice(left, left + size[0]))
    return Animation(frames=tuple(frames), durations=tuple(durations), image_area=image_area)


def check_format(path: str | Path) -> None:
    """Check that an animation can be written to this path, before computing it.

    Raises:
        OutputError: if the suffix is not supported, or ffmpeg is needed but missing.

    Example:
        >>> check_format("sweep.gif")
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise OutputError(f"{str(path)!r} does not have the suffix of an animation. Use one of {', '.join(FORMATS)}.")
    if suffix == ".mp4":
        _find_ffmpeg()


def save_animation(
    sweeps: Mapping[str, Sweep],
    path: str | Path,
    *,
    most_bytes: int = MOST_BYTES,
    fading_frames: int = 2,
    shared_scale: bool = False,
    smooth: float = 0.0,
    colormap: str = COLOUR_MAP,
    force: bool = True,
) -> Animation:
    """Write sweeps as an animation, with the largest panels that stay within a size limit.

    Args:
        sweeps: see `animate`.
        path: output file, .gif, .webp or .mp4; .mp4 needs ffmpeg.
        most_bytes: size limit in bytes, positive.
        fading_frames: see `animate`.
        shared_scale: see `animate`.
        smooth: see `animate`.
        colormap: see `animate`.
        force: whether to overwrite an existing file.

    Returns:
        The animation that was written.

    Raises:
        OutputError: if the suffix is not supported, ffmpeg is needed but missing, the file exists and `force` is off,
            the file cannot be written, or it is too large even with the smallest panels.
        InputError: if the sweeps do not match.
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
    # Written this way so that NaN fails too.
    if not most_bytes > 0:
        raise SettingError(f"`most_bytes` is {most_bytes}, but it must be positive.")
    encode = {".gif": _gif, ".webp": _webp, ".mp4": _mp4}[path.suffix.lower()]
    size = _SIZES[0]
    while True:
        moving = animate(
            sweeps,
            panel_size=size,
            fading_frames=fading_frames,
            shared_scale=shared_scale,
            smooth=smooth,
            colormap=colormap,
        )
        content = encode(moving)
        if len(content) <= most_bytes:
            break
        if size == _SIZES[-1]:
            raise OutputError(
                f"{str(path)!r} would need {len(content):,} bytes with the smallest panels, more than {most_bytes:,}. "
                "Sweep over fewer values, or raise `most_bytes`."
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
        shown = [(sweep.setting, sweep.values, sweep.target.index, sweep.against) for sweep in (first, other)]
        if shown[0] != shown[1]:
            raise InputError("The sweeps differ in setting, values or class. Make all of `sweeps` with the same ones.")
        if other.method != first.method:
            raise InputError(
                f"The sweeps use the methods {first.method!r} and {other.method!r}, but share one plain map. Make all "
                "of `sweeps` with one method."
            )
        if not np.array_equal(other.picture, first.picture):
            raise InputError("The sweeps show different images. Animate each image separately.")
    return first


def _compose(panels: Sequence[NDArray[np.uint8]], titles: Sequence[str], captions: Sequence[str]) -> NDArray[np.uint8]:
    """Place panels side by side on white, with titles above and captions below."""
    height, width = panels[0].shape[:2]
    letters, line = _letters_and_line(width)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", letters)
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
    """Font size and line height in pixels, for panels of this width."""
    letters = max(9, round(width / 16))
    return letters, round(letters * 1.7)


def _left_of(place: int, width: int) -> int:
    """First column of a panel, centred in its slot."""
    room = max(width, _ROOM)
    return _GAP + place * (room + _GAP) + (room - width) // 2


def _panel_shape(picture: NDArray[Any], side: int) -> tuple[int, int]:
    """Width and height of a panel with the area of a square one and the image's aspect ratio."""
    height, width = picture.shape[:2]
    ratio = math.sqrt(width / height)
    return max(1, round(side * ratio)), max(1, round(side / ratio))


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut the text where it would run into the next panel."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _resized_picture(picture: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    resized = Image.fromarray(to_bytes(picture)).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.float64) / 255


def _gif(moving: Animation) -> bytes:
    # One palette for all frames, or still panels would flicker.
    sample = np.concatenate(moving.frames[:: max(1, len(moving.frames) // 4)])
    palette = _with_paper(Image.fromarray(sample).quantize(_COLOURS, method=Image.Quantize.MEDIANCUT))
    # Only the image is dithered: dithered maps would take too many bytes, and equal pixels would no longer be equal.
    image = Image.fromarray(moving.frames[0][moving.image_area])
    dithered = np.asarray(image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    frames = []
    for frame in moving.frames:
        levels = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        levels[moving.image_area] = dithered
        indexed = Image.fromarray(levels)
        indexed.putpalette(palette.getpalette() or [])
        frames.append(indexed)
    return _encode(frames, moving, "GIF", optimize=False)


def _with_paper(palette: Image.Image) -> Image.Image:
    """Replace colours near the paper's by the paper's own, since Pillow's coarse search would pick them instead."""
    # Pillow pads the rest of the palette with unused greys.
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
    # yuv420p needs even sides, and players need a constant frame rate.
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
        raise OutputError(f"ffmpeg could not write the animation ({reason[0]}). Write a .gif instead.")
    return done.stdout


def _find_ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        raise OutputError("Writing .mp4 needs ffmpeg, which is not installed. Install it, or write a .gif.")
    return program
