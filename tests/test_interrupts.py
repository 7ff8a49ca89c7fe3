"""What may come in between: modes of torch's, other threads, code of the user's own, signals."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time

import hostile
import numpy as np
import pytest
import torch
from conftest import AVAILABLE
from helpers import assert_same, fewer, fill_gradients, params, snapshot
from hostile import assert_equal, stepped

import fusedopt
from fusedopt import host, interrupts

engine = hostile.engine


def test_gradient_that_runs_python(engine):
    """A TorchFunctionMode sees Tensor.grad; what it does there happens before anything is trusted."""
    count = fewer(engine, 600)
    ours, a, theirs, b = stepped(engine, [(3,)] * count)
    victim, done = ours[count // 2], []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if not done and args and args[0] is victim and getattr(func, "__self__", None) is torch.Tensor.grad:
                done.append(func)
                state = a.state[victim]
                state["step"] = state["step"].clone()
                state["exp_avg"].data = state["exp_avg"].data.clone()
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        with Mode():
            a.step()
        b.step()
        assert_equal(ours, a, theirs, b)
        assert done
        done.clear()


def test_threads_take_turns(engine):
    count = 5
    ours, a, theirs, b = stepped(engine, [(2000,)] * 3)
    threads = [threading.Thread(target=lambda: [a.step() for _ in range(count)]) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for _ in range(3 * count):
        b.step()
    assert_equal(ours, a, theirs, b)


class Meddler(float):
    """A number that does something when it is read."""

    def __new__(cls, value, deed):
        self = super().__new__(cls, value)
        self.deed = deed
        return self

    def __float__(self):
        self.deed()
        return float.__add__(self, 0.0)


def test_step_inside_of_a_step_is_refused(engine):
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    a.param_groups[0]["lr"] = Meddler(0.1, a.step)
    with pytest.raises(RuntimeError, match="inside of the same optimizer's step"):
        a.step()
    assert_same(snapshot(a), before)


def test_lr_that_changes_the_groups(engine):
    ours, a, _, _ = stepped(engine)
    extra = params((3,), (2,))

    def meddle():
        fill_gradients(extra)
        a.param_groups[0]["params"] = [*ours, *extra]
        a.param_groups.append(dict(a.param_groups[0], params=[], lr=0.5))

    def forget():
        del a.param_groups[1:]
        a.param_groups[0]["params"] = []

    for deed in (meddle, forget):
        a.param_groups[0]["lr"] = Meddler(0.1, deed)
        for _ in range(2):
            with contextlib.suppress(RuntimeError):  # that things change while it plans
                a.step()
        a.param_groups[0].update(lr=0.1, params=ours)
        del a.param_groups[1:]
        fill_gradients(ours)
        a.step()


def interrupted_steps(optimizer, seconds):
    """Twenty steps at a time until time is up, with a signal now and then; yields whether it came."""
    armed = False

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    rng = np.random.default_rng(0)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(2e-5, 2e-3)))
                for _ in range(20):
                    optimizer.step()
                armed = False
                yield False
            except KeyboardInterrupt:
                armed = False
                yield True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# Not Triton's interpreter, whose steps take too long to be interrupted often; its plans are those of the cuda engine.
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("engine", [*(name for name in AVAILABLE if name != "triton"), "auto"], indirect=True)
def test_a_step_and_its_counters_are_one(engine, name):
    """Whenever a signal arrives, all parameters have been through the same number of whole steps."""
    mixed = engine == "auto"  # with an optimizer that two engines step

    def make(engine):
        torch.manual_seed(5)
        ps = params((300,), (40, 5), (7,))
        options = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
        groups = [{"params": ps[:2]}, {"params": ps[2:], "differentiable": mixed}]
        if mixed:
            ps[2].requires_grad_(False)
        fill_gradients(ps)
        return ps, getattr(fusedopt, name)(groups, lr=1e-3, engine=engine, **options)

    ps, optimizer = make(engine)
    reference, twin = make(engine)
    for each in (optimizer, twin):  # modules that the first step imports don't like to be interrupted
        each.step()
    interruptions = taken = 0
    for interrupted in interrupted_steps(optimizer, 1.5):
        interruptions += interrupted
        for _ in range(21):  # it took no more
            if all(torch.equal(p, q) for p, q in zip(ps, reference, strict=True)):
                break
            twin.step()
            taken += 1
        assert_same(snapshot(optimizer), snapshot(twin))
        torch.set_grad_enabled(True)  # torch's own guard may have been interrupted while it put it back
    assert interruptions > 5 and taken > 5


def at_event(number, deed):
    """A profiler that does something after so many calls and returns of Python; and a list that tells if it did."""
    seen, done = [], []

    def look(frame, event, argument):
        seen.append(event)
        if len(seen) == number:
            sys.setprofile(None)
            done.append(True)
            deed()

    return look, done


DEEDS = {
    "a state's memory is given back": lambda a, p: a.state[p]["exp_avg"].untyped_storage().resize_(0),
    "a parameter is elsewhere": lambda a, p: setattr(p, "data", p.detach().clone()),
    "a parameter is another type": lambda a, p: setattr(p, "data", p.detach().double()),
    "a gradient is gone": lambda a, p: setattr(p, "grad", None),
    "a gradient's memory is given back": lambda a, p: p.grad.untyped_storage().resize_(0),
    "a counter's memory is given back": lambda a, p: a.state[p]["step"].untyped_storage().resize_(0),
}


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
@pytest.mark.parametrize("mixed", [False, True], ids=["one engine", "two engines"])
@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("third", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))])
def test_what_happens_between_any_two_calls(monkeypatch, deed, mixed, third):
    """The step is done, or an error says that it cannot be; what was not touched is stepped whole or not at all."""
    monkeypatch.setattr(host, "CHECKED", False)  # what is checked in Python may change before it is
    for number in range(1 + (third + list(DEEDS).index(deed)) % 3, 10_000, 3):
        ps = params((300,), (40, 5), (7,))
        groups = [{"params": ps[:2]}, {"params": ps[2:], "differentiable": mixed}]
        ps[2].requires_grad_(not mixed)
        optimizer = fusedopt.AdamW(groups, max_grad_norm=1.0)
        fill_gradients(ps)
        optimizer.step()
        before = [p.detach().clone() for p in ps]
        look, done = at_event(number, lambda optimizer=optimizer, p=ps[0]: DEEDS[deed](optimizer, p))
        sys.setprofile(look)
        try:
            optimizer.step()
        except (RuntimeError, TypeError, ValueError) as error:
            assert done, error
        finally:
            sys.setprofile(None)
        for p, old in zip(ps[1:], before[1:], strict=True):
            assert torch.equal(p, old) == (optimizer.state[p]["step"] == 1)
        if not done:
            break
    assert number > 20


def test_collection_is_left_as_it_was():
    ps = params((3,), (4,))
    fill_gradients(ps)
    optimizer = fusedopt.AdamW(ps)
    for _ in range(2):
        optimizer.step()
        assert gc.isenabled()
    gc.disable()
    try:
        optimizer.step()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_interrupted_first_step_leaves_no_states(engine):
    ps = params((5,), (4,))
    fill_gradients(ps)
    optimizer = fusedopt.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5, engine=engine)

    class Boom(float):
        def __float__(self):
            raise KeyboardInterrupt

    optimizer.param_groups[0]["lr"] = Boom(0.1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not any(optimizer.state.values())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    for p in ps:
        assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


def test_all_handlers_are_put_back_and_run():
    """Also when the first of them raises, and when one that is back already does so meanwhile."""
    ran = []

    def first(number, frame):
        ran.append(number)
        raise KeyboardInterrupt

    def second(number, frame):
        ran.append(number)

    old = {s: signal.signal(s, h) for s, h in ((signal.SIGINT, first), (signal.SIGUSR1, second))}
    try:
        with pytest.raises(KeyboardInterrupt):
            with interrupts.held_back():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.01)
                assert not ran
        assert set(ran) == {signal.SIGINT, signal.SIGUSR1}
        assert signal.getsignal(signal.SIGINT) is first and signal.getsignal(signal.SIGUSR1) is second
    finally:
        for s, h in old.items():
            signal.signal(s, h)


class Iterable:
    def __init__(self, items, deed):
        self.items, self.deed = items, deed

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def __iter__(self):
        self.deed()
        return iter(self.items)


@pytest.mark.parametrize("steps", [0, 2])
def test_groups_that_shrink_while_they_are_looked_at(engine, steps):
    ours = params((3,), (4,))
    a = fusedopt.AdamW([{"params": ours[:1]}, {"params": ours[1:]}], engine=engine)
    for _ in range(steps):
        fill_gradients(ours)
        a.step()
    groups = list(a.param_groups)
    fill_gradients(ours)
    for after in range(6):  # the n-th look is the one
        looks = []

        def deed(after=after, looks=looks):
            looks.append(0)
            if len(looks) > after:
                del a.param_groups[:]

        groups[0]["params"] = Iterable(ours[:1], deed)
        a.param_groups[:] = groups
        with contextlib.suppress(RuntimeError, IndexError):
            a.step()
    groups[0]["params"] = ours[:1]
    a.param_groups[:] = groups
    a.step()


def test_mode_that_is_entered_while_groups_are_looked_at(engine):
    """Gradients run Python from then on."""
    ours = params(*[(3,)] * fewer(engine, 700))
    fill_gradients(ours)
    a = fusedopt.AdamW(ours, engine=engine)
    a.step()

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__self__", None) is torch.Tensor.grad and gc.isenabled() and args[0] is ours[-1]:
                with torch._C.DisableTorchFunction():
                    a.state[ours[0]]["exp_avg"].untyped_storage().resize_(0)
            return func(*args, **(kwargs or {}))

    a.param_groups[0]["params"] = Iterable(ours, lambda: stack.enter_context(Mode()))
    with contextlib.ExitStack() as stack, contextlib.suppress(RuntimeError, ValueError):
        a.step()
    a.state[ours[0]]["exp_avg"].untyped_storage().resize_(12)  # or it could not be printed
