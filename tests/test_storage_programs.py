"""Random programs of storage: whatever happens to an optimizer between two steps, each is that of the slow model."""

import copy
import io
import json

import pytest
import storage_model as model
import torch
from conftest import AVAILABLE
from helpers import assert_same, programs_of
from hypothesis import Phase, given
from hypothesis import strategies as st
from storage_truth import Truth, check_step

import fusedopt

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in model.LEGAL}
STATES = {None: None, "bfloat16": torch.bfloat16, "8bit": "8bit"}
SHAPES = [[4097], [5, 911], [17, 300], [64, 65], [9, 600], [2, 3, 800], [300, 16], [31], [4096], [1, 4100], [0, 5]]
LAYOUTS = ["dense", "transposed", "gaps", "behind"]


@st.composite
def storages(draw, dtype):
    state_dtype, master = draw(st.sampled_from(model.LEGAL[DTYPES[dtype]]))
    return next(name for name, value in STATES.items() if value == state_dtype), master


@st.composite
def programs(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    params = st.tuples(st.sampled_from(SHAPES), st.sampled_from(LAYOUTS))
    index = st.integers(0, 3)
    between = st.one_of(
        st.tuples(st.just("gradient"), index, st.integers(0, 99), st.sampled_from([None, "float32", "bfloat16"])),
        st.tuples(st.just("scale"), index, st.sampled_from([0.0, 1e-30, 1e-4, 1e4])),
        st.tuples(st.just("no_gradient"), index),
        st.tuples(st.just("set"), st.sampled_from(["lr", "weight_decay"]), st.sampled_from([0.0, 0.01, 0.3])),
        st.tuples(st.just("write"), index, st.sampled_from(["half", "mask", "copy"])),
        st.tuples(st.just("load"), st.sampled_from(["same", "file"])),
        st.tuples(st.just("copy")),
        st.tuples(st.just("convert"), storages(dtype)),
        st.tuples(st.just("move"), index),
        st.tuples(st.just("forget"), index),
    )
    return {
        "dtype": dtype,
        "storage": draw(storages(dtype)),
        "params": draw(st.lists(params, min_size=1, max_size=3)),
        "rounds": draw(st.lists(st.lists(between, max_size=2), min_size=2, max_size=4)),
    }


def laid(t, layout):
    """The same values in memory of another kind."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        return torch.stack([t, t], -1)[..., 0]
    if layout == "behind":  # at no multiple of 16 bytes
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t


class Program:
    """An optimizer; what may happen to it are methods."""

    def __init__(self, program, engine):
        self.dtype, (self.state_dtype, self.master) = DTYPES[program["dtype"]], program["storage"]
        generator = torch.Generator().manual_seed(0)
        self.params = []
        for shape, layout in program["params"]:
            values = torch.randn(shape, generator=generator).to(self.dtype)
            self.params.append(torch.nn.Parameter(laid(values, layout)))
        self.engine = engine
        self.optimizer = self.made()

    def made(self):
        storage = {"state_dtype": STATES[self.state_dtype], "master": self.master}
        options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "engine": self.engine}
        return fusedopt.AdamW(self.params, **options, **storage)

    def run(self, rounds):
        for i in range(len(self.params)):
            self.gradient(i, i, None)
        for ops in rounds:
            for name, *arguments in ops:
                getattr(self, name)(*arguments)
            self.step()

    def step(self):
        others = [p for p in self.params if p.grad is None]
        before = copy.deepcopy([(p.detach(), self.optimizer.state.get(p)) for p in others])
        truth = Truth(self.optimizer, self.params, self.master)
        self.optimizer.step()
        check_step(self.optimizer, self.params, truth, self.master)
        assert_same([(p.detach(), self.optimizer.state.get(p)) for p in others], before)

    def at(self, i):
        return self.params[i % len(self.params)]

    def gradient(self, i, seed, dtype):
        p = self.at(i)
        p.grad_dtype = None
        model.give_gradients([p], seed, DTYPES.get(dtype))

    def scale(self, i, factor):
        if self.at(i).grad is not None:
            self.at(i).grad.mul_(factor)

    def no_gradient(self, i):
        self.at(i).grad = None

    def set(self, key, value):
        self.optimizer.param_groups[0][key] = value

    @torch.no_grad()
    def write(self, i, how):
        p = self.at(i)
        if how == "half":
            p.mul_(0.5)
        elif how == "mask":
            p.view(-1)[::3].zero_() if p.is_contiguous() else p[:1].zero_()
        else:
            p.copy_(p.flip(0))

    def load(self, how):
        saved = self.optimizer.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            self.optimizer = self.made()
        self.optimizer.load_state_dict(saved)

    def copy(self):
        gradients = [p.grad for p in self.params]
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))
        for p, g in zip(self.params, gradients, strict=True):
            p.grad_dtype = None
            p.grad = g

    def convert(self, storage):
        self.state_dtype, self.master = storage
        fusedopt.convert_state(self.optimizer, state_dtype=STATES[self.state_dtype], master=self.master)

    def move(self, i):
        self.at(i).data = self.at(i).detach().clone()

    def forget(self, i):
        self.optimizer.state.pop(self.at(i), None)


EXAMPLES = {"cpu": 300, "cuda": 60, "eager": 60}


@pytest.fixture(params=[engine for engine in EXAMPLES if engine in AVAILABLE])
def found(request):
    """An engine, and how many programs it runs."""
    return request.param, EXAMPLES[request.param]


def check(engine, examples):
    @programs_of(examples, Phase.shrink)
    @given(programs())
    def run(program):
        try:
            Program(program, engine).run(program["rounds"])
        except Exception as error:
            error.add_note(f"program: {json.dumps(program)}")
            raise

    run()


def test_programs(found):
    check(*found)


@pytest.mark.nightly
def test_many_programs(found):
    engine, examples = found
    check(engine, 10 * examples)
