"""The one logger, `kvik`. Nothing is configured on import; the command line calls `configure`."""

from __future__ import annotations

import logging
import sys

__all__ = ["configure", "logger"]

logger = logging.getLogger("kvik")
logger.addHandler(logging.NullHandler())


def configure(level: str) -> None:
    """Send log lines of `level` (debug, info, warning, error) and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
