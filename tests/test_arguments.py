"""Which parameters and numbers torch.optim takes, and what it says of others, at construction and while training."""

import warnings

import numpy as np
import pytest
import torch
from helpers import TORCH, close, copies, params, same_gradients

import fusedopt

MODULES = {"ours": fusedopt, "theirs": torch.optim}
DUPLICATE = (
    "optimizer contains a parameter group with duplicate parameters; in future, this will cause an error; see "
    "github.com/pytorch/pytorch/issues/40967 for more information"
)
each = pytest.mark.parametrize("name", TORCH)
each_module = pytest.mark.parametrize("module", MODULES)


@each
@each_module
@pytest.mark.parametrize("form", ["list", "names", "group", "added"])
def test_a_parameter_given_twice_is_warned_of_once(name, module, form):
    (p,) = params((3,))
    argument = {"names": [("a", p), ("b", p)], "group": [{"params": [p, p]}], "added": params((2,))}.get(form, [p, p])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = getattr(MODULES[module], name)(argument)
        if form == "added":
            assert not seen
            optimizer.add_param_group({"params": (p, p)})
    assert [(w.category, str(w.message)) for w in seen] == [(UserWarning, DUPLICATE)]
    assert optimizer.param_groups[-1]["params"] == [p, p]


@each
@each_module
@pytest.mark.parametrize("added", [False, True])
def test_a_parameter_of_two_groups_is_refused(name, module, added):
    (p, q), make = params((3,), (2,)), getattr(MODULES[module], name)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        if added:
            make([p]).add_param_group({"params": [q, p]})
        else:
            make([{"params": [p]}, {"params": [q, p]}])


@each
@each_module
def test_sets_have_no_order(name, module):
    """Torch makes a list of one that is all of the parameters, and refuses one that is a group's."""
    ps, make = params((3,), (2,)), getattr(MODULES[module], name)
    assert {*make({*ps}).param_groups[0]["params"]} == {*ps}
    message = "optimizer parameters need to be organized in ordered collections"
    with pytest.raises(TypeError, match=message):
        make([{"params": {*ps}}])
    optimizer = make(ps)
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": {*params((1,))}})
    assert len(optimizer.param_groups) == 1


KINDS = {
    "float32": np.float32,
    "float64": np.float64,
    "array": np.array,
    "array of one": lambda v: np.array([v]),
    "tensor": lambda v: torch.tensor(v, dtype=torch.float64),
    "tensor of one": lambda v: torch.tensor([v]),
}
OF_PAIRS = {"array of one": "array"}  # torch takes no other


@each
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_kind_while_training(engine, name, kind):
    """Put into the group between steps, as schedules do it; pairs element by element, and as a whole."""
    ours = params((7,))
    theirs = copies(ours)
    a, b = getattr(fusedopt, name)(ours, engine=engine), getattr(torch.optim, name)(theirs, foreach=False)
    numbers = {k: v for k, v in b.param_groups[0].items() if type(v) in (float, tuple)}
    make = KINDS[kind]
    for t in range(4):
        same_gradients(ours, theirs)
        a.step(), b.step()
        for key, value in numbers.items() if t else ():
            new = tuple(0.9 * x for x in value) if isinstance(value, tuple) else 0.9 * value
            b.param_groups[0][key] = new
            is_apart = isinstance(value, tuple) and (t < 2 or kind not in ("array", "tensor"))
            a.param_groups[0][key] = [KINDS[OF_PAIRS.get(kind, kind)](x) for x in new] if is_apart else make(new)
    close(ours[0], theirs[0])


@each
@pytest.mark.parametrize(
    "number", [1, np.int64(1), np.array(1), torch.tensor(1)], ids=["int", "int64", "array", "tensor"]
)
def test_whole_numbers(engine, name, number):
    ours = params((7,))
    theirs = copies(ours)
    a = getattr(fusedopt, name)(ours, lr=number, engine=engine)
    b = getattr(torch.optim, name)(theirs, lr=1, foreach=False)
    for _ in range(3):
        same_gradients(ours, theirs)
        a.step(), b.step()
    close(ours[0], theirs[0])
