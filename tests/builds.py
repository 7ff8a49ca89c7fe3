"""What the tests build for themselves, with what setup.py builds with."""

import fcntl
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
try:
    import setup  # noqa: F401
finally:
    sys.path.remove(str(ROOT))
toolchain = sys.modules["toolchain"]  # of csrc/, which setup.py has imported


def run(ninja):
    """Builds anew what a source is newer than.

    Raises:
        RuntimeError: If something does not compile.
    """
    ninja.folder.mkdir(parents=True, exist_ok=True)
    with open(ninja.folder / "lock", "w") as lock:  # workers of one test run, or two test runs, ask for it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja.run()
