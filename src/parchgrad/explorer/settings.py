"""Settings of the explorer's server."""

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path

from parchgrad.errors import SettingError
from parchgrad.models.classifier import Classifier
from parchgrad.models.loading import OFFLINE_MODEL, SHAPES_MODEL

__all__ = ["OwnNetwork", "WebSettings", "is_loopback"]

# Pillow's own limit.
_MOST_MEGAPIXELS = 178


@dataclass(frozen=True, eq=False)
class OwnNetwork:
    """A network of the user's own.

    Attributes:
        classifier: the network; its name is that of the initial network.
        code: Python expression that loads it, for snippets.
    """

    classifier: Classifier
    code: str


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Settings of the explorer's server.

    Attributes:
        host: address to bind to; other machines can connect unless it is a loopback address.
        port: port, below 65536; 0 uses any free port.
        network: network that is selected initially.
        own: that network, if it is the user's own; None loads it by name.
        statistics: file of channel statistics of that network; None uses the bundled ones, if any.
        max_megabytes: size limit of an uploaded file; a mosaic may have four of that size.
        max_megapixels: size limit of an image, at most 178.
        max_stored_megabytes: size limit of all uploaded files together, which are kept for a few hours; further uploads
            are refused.
        any_network: whether users may enter any network name, which may trigger downloads and use much memory.
        max_waiting: maximum number of waiting requests.
        max_sessions: maximum number of visits whose state is kept: about 1 MB each, 5 MB for a mosaic.
        frame_ancestors: origins that may embed the page in a frame, such as `"https://huggingface.co"`.

    Raises:
        SettingError: if a number is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    network: str = OFFLINE_MODEL
    own: OwnNetwork | None = None
    statistics: Path | None = None
    max_megabytes: float = 20
    max_megapixels: float = 50
    max_stored_megabytes: float = 2000
    any_network: bool = True
    max_waiting: int = 64
    max_sessions: int = 200
    frame_ancestors: str = "'none'"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise SettingError(f"`port` is {self.port}, but it must be from 0 to 65535.")
        for name in ("max_megabytes", "max_megapixels", "max_stored_megabytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"`{name}` is {getattr(self, name)}, but it must be positive.")
        if self.max_megapixels > _MOST_MEGAPIXELS:
            raise SettingError(
                f"`max_megapixels` is {self.max_megapixels:g}, but it must be at most {_MOST_MEGAPIXELS}, the limit of "
                "Pillow."
            )

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks to choose from."""
        return tuple(dict.fromkeys((self.network, OFFLINE_MODEL, SHAPES_MODEL)))


def is_loopback(host: str) -> bool:
    """Whether an address is only reachable from this machine.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
