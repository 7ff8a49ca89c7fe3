"""Random programs for twins.py: what is stepped, and what happens to it. Plain values, that shrink and are JSON."""

from functools import cache

from hypothesis import strategies as st

NAMES = ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop"]
WITHOUT_EPS = ("SGD", "ASGD", "Rprop")
SHAPES = [[3], [], [0], [1], [7], [2, 3], [5, 5], [4, 1], [3, 0, 2], [2, 3, 4], [3, 2, 4, 5], [33], [1024], [37, 110]]
WIDE = ("float64", "complex128")
MIXED = ("float32", "bfloat16", "float16", "complex64", *WIDE)

# Gradients as small as eps make a step as steep as 1 / eps, so that rounding shows: eps is large where it is coarse.
EPS = {"fine": [1e-8, 1e-3], "coarse": [1e-2, 0.1]}
BETAS = [[0.9, 0.999], [0.9, 0.95], [0.0, 0.99], [0.5, 0.5]]

seeds = st.integers(0, 999)
index = st.integers(0, 7)
one_or_all = st.none() | index
quarters = st.integers(0, 3)
layouts = st.tuples(st.integers(0, 23), st.integers(1, 3), st.integers(0, 2), st.integers(0, 3)).map(list)


@cache
def hypers(name, precision):
    """Strategies of the hyperparameters that may change while training."""
    found = {
        "lr": st.sampled_from([0.1, 0.01, 0.5, 0.0]),
        "weight_decay": st.sampled_from([0.0, 0.1, 0.01]),
        "maximize": st.booleans(),
    }
    if name == "Rprop":
        del found["weight_decay"]
        found["etas"] = st.sampled_from([[0.5, 1.2], [0.25, 2.0]])
        found["step_sizes"] = st.sampled_from([[1e-6, 50.0], [0.01, 0.1]])
    if name == "ASGD":
        found["lambd"] = st.sampled_from([1e-4, 0.1])
        found["alpha"] = st.sampled_from([0.75, 1.0])
        found["t0"] = st.sampled_from([1e6, 0.0, 2.0])
    if name == "Adadelta":
        found["rho"] = st.sampled_from([0.9, 0.5])
    if name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax"):
        found["betas"] = st.sampled_from(BETAS)
    if name not in WITHOUT_EPS:
        found["eps"] = st.sampled_from(EPS[precision])
    if name == "SGD":
        found |= {"momentum": st.sampled_from([0.9, 0.0, 0.5]), "dampening": st.sampled_from([0.0, 0.5])}
    if name == "RMSprop":  # centered, the variance is v - m^2, which cancels when alpha forgets quickly
        found["alpha"] = st.sampled_from([0.9, 0.99])
    if name == "Adagrad":
        found["lr_decay"] = st.sampled_from([0.0, 0.1])
    if name == "NAdam":
        found["momentum_decay"] = st.sampled_from([4e-3, 0.1])
    return found


@cache
def some(name, precision):
    found = dict(hypers(name, precision))
    return st.fixed_dictionaries({"lr": found.pop("lr")}, optional=found)


@cache
@st.composite
def options(draw, name, precision):
    """Some constructor arguments, or a group's."""
    chosen = draw(some(name, precision))
    if name not in WITHOUT_EPS:
        chosen["eps"] = chosen.get("eps", EPS[precision][-1])
    if name in ("Adam", "AdamW"):
        chosen["amsgrad"] = draw(st.booleans())
    if name in ("Adam", "NAdam", "RAdam"):
        chosen["decoupled_weight_decay"] = draw(st.booleans())
    if name == "RMSprop":
        chosen |= {"centered": draw(st.booleans()), "momentum": draw(st.sampled_from([0.0, 0.9]))}
    if name == "Adagrad":
        chosen["initial_accumulator_value"] = draw(st.sampled_from([0.0, 0.1]))
    if name == "SGD" and draw(st.booleans()):
        chosen |= {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
    return chosen


@cache
def parameters(dtypes):
    return st.fixed_dictionaries(
        {"shape": st.sampled_from(SHAPES), "dtype": st.sampled_from(dtypes), "seed": seeds, "layout": layouts}
    )


@cache
@st.composite
def groups(draw, name, precision, dtypes, most=4):
    return {
        "params": draw(st.lists(parameters(dtypes), min_size=1, max_size=most)),
        "options": draw(options(name, precision)),
    }


@cache
def gradients(which):
    kinds = st.sampled_from(["new", "in place", "like", "expanded", "negated", "conjugated", "zero"])
    return st.tuples(st.just("fill"), which, seeds, kinds, st.sampled_from([1.0, 0.01, 8.0]), layouts)


@cache
@st.composite
def changes(draw, name, precision):
    """Values of a group's hyperparameters, as numbers or as tensors."""
    found = hypers(name, precision)
    key = draw(st.sampled_from(sorted(found)))
    value = draw(found[key])
    kind = "number"
    if key in ("lr", "betas"):
        kind = draw(st.sampled_from(["number", "float32", "float64"]))
    return ["set", draw(index), key, value, kind]


@cache
def mutations(name, precision, dtypes):
    just, pick = st.just, st.sampled_from
    others = [d for d in MIXED if "complex" not in d]
    choices = [
        gradients(one_or_all),
        changes(name, precision),
        st.tuples(just("no_gradient"), one_or_all),
        st.tuples(just("zero_grad"), st.booleans()),
        st.tuples(just("load"), pick(["same", "new", "file", "from torch", "to torch", "to torch and back"])),
        st.tuples(just("copy"), pick(["deepcopy", "pickle"])),
        st.tuples(
            just("move"), one_or_all, pick(["data", "swap", "lazy", "transpose", "negated", "conjugated"]), layouts
        ),
        st.tuples(just("flatten"), pick(dtypes), layouts),
        st.tuples(
            just("replace_state"),
            one_or_all,
            st.integers(0, 2),
            pick(["entry", "data", "lazy", "transpose", "negated", "conjugated"]),
            layouts,
        ),
        st.tuples(
            just("cast_state"), one_or_all, st.integers(0, 2), pick(["entry", "data", "same address"]), pick(others)
        ),
        st.tuples(just("forget"), one_or_all, pick(["delete", "clear", "empty"])),
        st.tuples(just("relist"), index, pick(["list", "tuple", "reversed", "dicts"])),
        st.tuples(just("recount"), one_or_all, pick(["int", "float", "float64", "int64", "bfloat16", "one element"])),
        st.tuples(just("add_group"), groups(name, precision, dtypes, most=2)),
        st.tuples(just("clip"), pick([None, 0.1, 1.0, 100.0])),
        st.tuples(just("skip"), st.booleans()),
    ]
    return st.one_of(choices)


@cache
def some_mutations(name, precision, dtypes):
    return st.lists(mutations(name, precision, dtypes), max_size=2)


@cache
@st.composite
def rounds(draw, name, precision, dtypes):
    """Some of what may happen, then a step."""
    ops = draw(some_mutations(name, precision, dtypes))
    if draw(quarters):
        ops.append(draw(gradients(st.none())))
    if draw(index) == 7:
        ops.append(("poison", draw(index), draw(seeds), draw(st.sampled_from(["inf", "-inf", "nan"]))))
    return [*map(list, ops), ["step"]]


@cache
def several(name, precision, dtypes, most):
    return st.lists(rounds(name, precision, dtypes), min_size=2, max_size=most)


@cache
@st.composite
def programs(draw, many=0):
    """A program of twins.run. Most are in double precision alone, where rounding hides nothing.

    Args:
        many: How many tiny parameters the first group has besides.
    """
    precision = draw(st.sampled_from(["fine", "coarse"]))
    dtypes = WIDE if precision == "fine" else MIXED
    name = draw(st.sampled_from(NAMES))
    return {
        "optimizer": name,
        "options": draw(options(name, precision)),
        "clip": draw(st.sampled_from([None, None, 0.1, 1.0, 100.0])),
        "skip": draw(st.booleans()),
        "many": many,
        "groups": draw(st.lists(groups(name, precision, dtypes), min_size=1, max_size=1 if many else 3)),
        "ops": [op for ops in draw(several(name, precision, dtypes, 3 if many else 6)) for op in ops],
    }
