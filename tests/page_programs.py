"""What tests of docs/not_an_optimizer.md need: its programs, by their headings, and textbook loops in fp64."""

import contextlib
import copy
import functools
import math
import re
from pathlib import Path

import torch

import fusedopt

PAGE = (Path(__file__).parents[1] / "docs" / "not_an_optimizer.md").read_text()
SECTIONS = {
    heading: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for heading, text in re.findall(r"^#+ ([^\n]+)\n(.*?)(?=^#+ [A-Z]|\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
HEADINGS = [heading for heading, blocks in SECTIONS.items() if blocks and heading != "What is not an optimizer"]
mean_square = torch.nn.MSELoss()
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@contextlib.contextmanager
def doubles():
    """New tensors are fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Model(torch.nn.Module):
    """The page's, without what is random or has buffers."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.blocks(x))


class Program:
    """A section's blocks, to be run one after another, in fp64.

    Args:
        heading: The section's.
        optimizers: What its ``fusedopt`` is.
        batches: How many.
        more: Other names.
    """

    def __init__(self, heading, optimizers=fusedopt, batches=4, **more):
        torch.manual_seed(1)
        model = Model().double()
        data = [(torch.randn(4, 8).double(), torch.randn(4, 1).double()) for _ in range(batches)]
        self.names = {
            **{"torch": torch, "math": math, "fusedopt": optimizers, "model": model, "batches": data},
            **{"x": data[0][0], "y": data[0][1], "loss": mean_square, "evaluate": lambda model: 0.0, **more},
        }
        self.before = copy.deepcopy(model)
        self.blocks = iter(SECTIONS[heading])
        self.next(SECTIONS["What is not an optimizer"][0])

    def __getattr__(self, name):
        return self.names[name]

    def next(self, block=None):
        """Runs the next block, or another."""
        with doubles():
            exec(compile(block or next(self.blocks), "docs/not_an_optimizer.md", "exec"), self.names)

    def all(self):
        """Runs all blocks that are left."""
        for block in self.blocks:
            self.next(block)
        return self

    def stepped(self):
        """All parameters of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def observe(self, see):
        """Has ``see`` called with the program before each evaluation of the loss."""
        self.names["loss"] = lambda output, y: (see(self), mean_square(output, y))[1]

    def call_before_training(self, see):
        """Has ``see`` called with the model before each call of ``train``."""
        train = self.names["train"]
        self.names["train"] = lambda model, *more: (see(model), train(model, *more))[1]


def textbook(before, batches, step, gradient=None):
    """A model after ``step(p, g, t)`` of all its parameters with each batch; gradients are autograd's or others."""
    model = copy.deepcopy(before)
    for t, (x, y) in enumerate(batches):
        ps = [*model.parameters()]
        if gradient is None:
            gradients = torch.autograd.grad(mean_square(model(x), y), ps)
        else:
            gradients = gradient(model, x, y)
        with torch.no_grad():
            for p, g in zip(ps, gradients, strict=True):
                p.copy_(step(p, g, t))
    return [*model.parameters()]


def sgd(lr, momentum=0.0):
    """A step of the textbook's; the rate may be a function of the step's number."""
    momenta = {}

    def step(p, g, t):
        momenta[p] = momentum * momenta.get(p, 0) + g
        return p - (lr(t) if callable(lr) else lr) * momenta[p]

    return step
