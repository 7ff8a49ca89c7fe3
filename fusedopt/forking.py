"""Threads in processes that forked."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_forks = 0


def _note_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


_AS_THEY_ARE = nullcontext()


def forks() -> int:
    """How many forks lie between this process and the one that imported this."""
    return _forks


def threads_that_exist() -> AbstractContextManager[None]:
    """One thread in a forked child, torch's included: the pool of its parent's is not there to be waited for."""
    return _one_thread() if _forks else _AS_THEY_ARE


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
