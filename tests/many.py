"""Functions of the tests on several ranks: processes that stay, and join a group of their own for each call."""

import multiprocessing
import tempfile
import time
import traceback
from pathlib import Path

LIMIT = 120  # seconds that a call may take


def _serve(rank, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (call := pipe.recv()) is not None:
        function, arguments, world, store = call
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
            torch.manual_seed(0)
            function(*arguments)
            dist.barrier()  # who leaves early ends others' connections
            pipe.send(None)
        except BaseException:
            pipe.send(f"rank {rank} of {world}:\n{traceback.format_exc()}")
            if not dist.is_initialized():
                continue
        dist.destroy_process_group()


class Ranks:
    """Processes that run functions together."""

    def __init__(self, most):
        self._most = most
        self._start()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(self._most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of a process is seen
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world, function, *arguments):
        """Call a function of a module on that many ranks; raises what went wrong on any of them."""
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self._pipes[:world]:
                pipe.send((function, arguments, world, Path(folder) / "store"))
            end = time.monotonic() + LIMIT
            told = [self._answer(rank, end) for rank in range(world)]
        failures = [text for text in told if text is not None]
        if failures:  # the others may wait for ever
            self.stop()
            self._start()
            raise AssertionError("\n".join(failures))

    def _answer(self, rank, end):
        """None if all is well there, else what went wrong."""
        try:
            if self._pipes[rank].poll(max(0, end - time.monotonic())):
                return self._pipes[rank].recv()
        except EOFError:
            return f"rank {rank} has died"
        return f"rank {rank} has not answered in {LIMIT} s"

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
