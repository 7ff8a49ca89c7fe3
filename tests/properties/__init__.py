"""Whatever happens to an optimizer, it steps as torch's does: random programs, run on both."""

from properties.programs import programs
from properties.twins import run

__all__ = ["programs", "run"]
