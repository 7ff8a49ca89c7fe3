"""What several functions take: counts, pairs of betas, and a function that returns the loss."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import SupportsIndex, cast

import numpy as np


def whole(name: str, value: object, least: int = 1) -> int:
    """A count, of an int or what numpy has of them; no bool.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is below the least.
    """
    try:
        number = operator.index(cast("SupportsIndex", value))
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if number < least:
        raise ValueError(f"{name} is {value!r}; it must be at least {least}")
    return number


def members(value: object) -> list[object] | None:
    """What a tuple, a list or an array of one dimension has, such as betas; None if it is neither."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return cast("list[object]", value.tolist())
    return list(cast("tuple[object, ...]", value)) if isinstance(value, (tuple, list)) else None


def called(loss_fn: Callable[..., object], how: str, *arguments: object) -> object:
    """What ``loss_fn`` returns; where it does not take these arguments, its error says how it is called.

    Args:
        loss_fn: The function.
        how: How it is called, such as ``loss_fn(model, batch)``.
        arguments: What it is given.
    """
    try:
        return loss_fn(*arguments)
    except TypeError as error:
        trace = error.__traceback__
        if trace is not None and trace.tb_next is None:  # raised by the call, not inside of the function
            error.add_note(f"loss_fn is called as {how}")
        raise
