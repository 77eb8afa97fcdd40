"""Load networks in the background, so that downloads do not block the request queue."""

import threading
import traceback
from concurrent.futures import Future

from parchgrad.errors import ParchGradError, SettingError
from parchgrad.explorer.views import Explorer

__all__ = ["Loading", "StillLoadingError"]

_LOADED_AT_ONCE = 2
# Number of failures kept until the network is requested again.
_REMEMBERED = 16


class StillLoadingError(ParchGradError):
    """The network is still loading; ask again later."""


class Loading:
    """Loads networks for an explorer, each in its own thread. Call it from one thread only.

    Example:
        >>> explorer = Explorer()
        >>> loading = Loading(explorer)
        >>> loading.require("shapes")
        Traceback (most recent call last):
        ...
        parchgrad.explorer.loading.StillLoadingError: Loading shapes. Results appear when it is ready.
        >>> while not explorer.holds("shapes"):
        ...     _ = threading.Event().wait(0.05)
        >>> loading.require("shapes")
    """

    def __init__(self, explorer: Explorer) -> None:
        """Set up the loader; nothing is loaded yet.

        Args:
            explorer: explorer that receives the loaded networks.
        """
        self._explorer = explorer
        self._coming: dict[str, Future[None]] = {}

    def require(self, network: str) -> None:
        """Check that the explorer has a network, or start loading it; never blocks.

        Args:
            network: name of a model; see `load_model`.

        Raises:
            StillLoadingError: if the network is loading; ask again later.
            SettingError: if too many other networks are loading.
            ParchGradError: if loading failed; the next call tries again.
        """
        # Forget loaded networks, since the explorer may have dropped them since.
        self._coming = {name: coming for name, coming in self._coming.items() if not _is_here(coming)}
        if self._explorer.holds(network):
            return
        coming = self._coming.get(network)
        if coming is not None and coming.done():
            del self._coming[network]
            coming.result()
        if coming is None:
            self._begin(network)
        raise StillLoadingError(f"Loading {network}. Results appear when it is ready.")

    def _begin(self, network: str) -> None:
        failed = [name for name, coming in self._coming.items() if coming.done()]
        waiting = [name for name in self._coming if name not in failed]
        if len(waiting) >= _LOADED_AT_ONCE:
            raise SettingError(f"{' and '.join(waiting)} are still loading. Choose {network} again later.")
        for name in failed[:-_REMEMBERED]:
            del self._coming[name]
        coming: Future[None] = Future()

        def load() -> None:
            try:
                self._explorer.classifier(network)
            except BaseException as error:
                _let_go(error)
                coming.set_exception(error)
            else:
                # Not the network itself, which would keep it in memory.
                coming.set_result(None)

        # A daemon thread, so that the server can stop during a download.
        threading.Thread(target=load, name=f"loading {network}", daemon=True).start()
        # Only after the start: if that fails, the entry would never complete.
        self._coming[network] = coming


def _is_here(coming: "Future[None]") -> bool:
    return coming.done() and coming.exception() is None


def _let_go(error: BaseException) -> None:
    """Free the local variables of a traceback, such as a partly loaded network, but keep the traceback."""
    failure: BaseException | None = error
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__
