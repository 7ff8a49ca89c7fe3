"""What must not be interrupted half-way: signal handlers and the garbage collector wait until it is over."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

# Those that people and schedulers send, and for which Python or its users have handlers that raise.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    if hasattr(signal, name)
)


Handlers = dict[int, Callable[[int, FrameType | None], object]]


@contextmanager
def held_back() -> Generator[None, None, None]:
    """Hold signals back until the block is over, then do what their handlers do, which run in the main thread only.

    Nor is garbage collected meanwhile, for finalizers run whatever they like.
    """
    with _signals_held_back():
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@contextmanager
def _signals_held_back() -> Generator[None, None, None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handlers: Handlers = {}

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append((number, frame))

    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, note)
        yield
    finally:
        try:
            _restore(handlers)
        finally:
            _run(handlers, arrived)


def _restore(handlers: Handlers) -> None:
    """Put all handlers back, whatever one that is back already raises meanwhile."""
    for number, handler in handlers.items():
        try:
            signal.signal(number, handler)
        except BaseException:
            _restore(handlers)
            raise


def _run(handlers: Handlers, arrived: list[tuple[int, FrameType | None]]) -> None:
    """Do what the handlers of signals that arrived do: of all, whatever the first ones raise."""
    if arrived:
        (number, frame), *rest = arrived
        try:
            handlers[number](number, frame)
        finally:
            _run(handlers, rest)
