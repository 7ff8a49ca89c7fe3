"""Silence for packages that print when they are imported, compiled or used."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def quiet() -> Iterator[None]:
    """Send what is written to stdout and stderr, by C++ and compilers too, to nowhere, and ignore warnings.

    Consoles that are to go on writing need a descriptor of their own: see ``own_stderr``.
    """
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with warnings.catch_warnings(), tempfile.TemporaryFile() as nowhere:
        warnings.simplefilter("ignore")
        try:
            for fd in (1, 2):
                os.dup2(nowhere.fileno(), fd)
            logging.disable(logging.WARNING)
            yield
        finally:
            logging.disable(logging.NOTSET)
            sys.stdout.flush(), sys.stderr.flush()
            for fd, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, fd)
                os.close(copy)


def own_stderr() -> TextIO:
    """A stream to stderr that goes on writing while others are silenced."""
    try:
        direct = sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):  # somebody captures it
        direct = False
    return os.fdopen(os.dup(2), "w", buffering=1) if direct else sys.stderr
