"""Networks that are loaded beside a queue, so that nobody who stands in it waits for a download of another."""

import threading
import traceback
from concurrent.futures import Future

from parchgrad.errors import ParchGradError, SettingError
from parchgrad.exploration import Explorer

__all__ = ["Loading", "StillLoadingError"]

_LOADED_AT_ONCE = 2
# Failures after which nobody has asked yet.
_REMEMBERED = 16


class StillLoadingError(ParchGradError):
    """Nothing is wrong: what is missing comes by itself."""


class Loading:
    """Networks on their way to an explorer, each in a thread of its own; one thread asks for them.

    Example:
        >>> explorer = Explorer()
        >>> loading = Loading(explorer)
        >>> loading.require("shapes")
        Traceback (most recent call last):
        ...
        parchgrad.loading.StillLoadingError: shapes is being loaded; it is shown as soon as it is here.
        >>> while not explorer.holds("shapes"):
        ...     _ = threading.Event().wait(0.05)
        >>> loading.require("shapes")
    """

    def __init__(self, explorer: Explorer) -> None:
        """Load nothing before it is asked for.

        Args:
            explorer: who holds the networks once they are loaded.
        """
        self._explorer = explorer
        self._coming: dict[str, Future[None]] = {}

    def require(self, network: str) -> None:
        """Make sure that the explorer holds a network, or begin to load it; returns at once in any case.

        Args:
            network: name of a model; see `load_model`.

        Raises:
            StillLoadingError: if it is on its way; ask again later.
            SettingError: if others are, as many as are loaded at once.
            ParchGradError: if it could not be loaded, which is tried once more when it is asked for again.
        """
        # What has come is the explorer's, which may have let go of it since.
        self._coming = {name: coming for name, coming in self._coming.items() if not _is_here(coming)}
        if self._explorer.holds(network):
            return
        coming = self._coming.get(network)
        if coming is not None and coming.done():
            del self._coming[network]
            coming.result()
        if coming is None:
            self._begin(network)
        raise StillLoadingError(f"{network} is being loaded; it is shown as soon as it is here.")

    def _begin(self, network: str) -> None:
        failed = [name for name, coming in self._coming.items() if coming.done()]
        waiting = [name for name in self._coming if name not in failed]
        if len(waiting) >= _LOADED_AT_ONCE:
            raise SettingError(f"{' and '.join(waiting)} are being loaded already; choose {network} again later.")
        for name in failed[:-_REMEMBERED]:
            del self._coming[name]
        coming: Future[None] = Future()

        def load() -> None:
            try:
                self._explorer.classifier(network)
            except BaseException as error:
                _let_go(error)
                # To whoever asks for it.
                coming.set_exception(error)
            else:
                # Not the network itself, which would be held here as well.
                coming.set_result(None)

        # A daemon: the end of the server does not wait for a download.
        threading.Thread(target=load, name=f"loading {network}", daemon=True).start()
        # Nobody would end the wait for a thread that could not start.
        self._coming[network] = coming


def _is_here(coming: "Future[None]") -> bool:
    return coming.done() and coming.exception() is None


def _let_go(error: BaseException) -> None:
    """Free what the frames of a failure hold, such as half a network; where it failed can still be read."""
    failure: BaseException | None = error
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__
