"""Teams of threads touch the same memory only in an order that OpenMP guarantees: ThreadSanitizer watches."""

import openmp_on_threads
import pytest

REASON = openmp_on_threads.missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.parametrize("program", openmp_on_threads.PROGRAMS),
]


@pytest.fixture(scope="module")
def built():
    return openmp_on_threads.build()


def test_threads_do_not_race_and_give_one_threads_result(built, program):
    run = openmp_on_threads.run(built[program])
    assert (run.returncode, run.stdout) == (0, "no difference\n"), run.stderr


def test_memory_that_is_shared_is_reported(built, program):
    run = openmp_on_threads.run(built[program], "--plant")
    assert run.returncode and "ThreadSanitizer: data race" in run.stderr, run.stderr
