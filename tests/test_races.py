"""The CPU engine's threads touch the same memory only in an order that OpenMP guarantees: ThreadSanitizer watches."""

import openmp_on_threads
import pytest

REASON = openmp_on_threads.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def races():
    return openmp_on_threads.build()


def test_threads_do_not_race_and_give_one_threads_result(races):
    run = openmp_on_threads.run(races)
    assert (run.returncode, run.stdout) == (0, "no difference\n"), run.stderr


def test_rows_over_the_same_memory_are_reported(races):
    run = openmp_on_threads.run(races, "--plant")
    assert run.returncode and "ThreadSanitizer: data race" in run.stderr, run.stderr
