"""The command `parchgrad`, also as `python -m parchgrad`."""

import sys

from parchgrad._io.extras import needs_extra
from parchgrad.errors import MissingExtraError


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        with needs_extra("cli"):
            from parchgrad.cli import main as run
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    run()


if __name__ == "__main__":
    main()
