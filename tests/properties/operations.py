"""What may happen to an optimizer of ours and to torch's alike."""

import copy
import io
import math
import pickle
from collections import defaultdict

import torch

import fusedopt
from properties.memory import Buffer, bits, values

PLAIN = [0, 1, 0, 0]
EXACT = ("ax", "step_size")  # states that may not be narrow
SCALARS = ("step", "mu_product", "eta", "mu")


def wide(t):
    """A contiguous copy in double precision."""
    t = t.detach().resolve_conj().resolve_neg()
    return t.to(torch.complex128 if t.is_complex() else torch.float64, copy=True, memory_format=torch.contiguous_format)


def tensors(state):
    """The names of a state's tensors that are shaped like the parameter."""
    return [key for key, value in state.items() if key not in SCALARS and value is not None]


def number(value):
    return [number(v) for v in value] if isinstance(value, (list, tuple)) else float(value)


class Training:
    """An optimizer of ours and torch's, everything that must stay as it is, and what people do to them in a training.

    Attributes:
        ours, theirs: Parameters, in the same order.
        a, b: Optimizers.
        buffers: Memory of ours; a step may write only what it steps.
        kept: Pairs of tensors that were replaced, and their bytes.
        largest: Of each parameter, the largest gradient so far: what rounding errors are relative to.
    """

    def __init__(self, program, engine):
        self.program, self.engine, self.name = program, engine, program["optimizer"]
        self.ours, self.theirs, self.buffers, self.kept, self.largest = [], [], [], [], []
        self.skipped = 0
        groups = [self.group(group) for group in program["groups"]]
        many = [{"shape": [k % 4], "dtype": "float64", "seed": k, "layout": PLAIN} for k in range(program["many"])]
        for pairs, group in zip(groups[0][0], self.group({"params": many, "options": {}})[0], strict=True):
            pairs.extend(group)
        self.make_ours([{"params": params[0], **options} for params, options in groups])
        self.b = getattr(torch.optim, self.name)(
            [{"params": params[1], **options} for params, options in groups], **self.defaults(), foreach=False
        )

    # ------------------------------------------------------------- what is stepped

    def defaults(self):
        return self.honoured(self.program["options"])

    def honoured(self, options):
        """The options without what Nesterov's momentum excludes."""
        options = dict(options)
        if options.get("nesterov"):
            options |= {"momentum": options["momentum"] or 0.9, "dampening": 0.0}
        return options

    def make_ours(self, groups):
        clip, skip = self.program["clip"], self.program["skip"]
        more = {"engine": self.engine, "max_grad_norm": clip, "skip_nonfinite": skip}
        self.a = getattr(fusedopt, self.name)(groups, **self.defaults(), **more)

    def group(self, group):
        """Lists of our and their new parameters, and their options."""
        placed = [(values(q["shape"], getattr(torch, q["dtype"]), q["seed"]), q["layout"]) for q in group["params"]]
        new = [torch.nn.Parameter(self.place(t, layout)) for t, layout in placed]
        copies = [torch.nn.Parameter(wide(p)) for p in new]
        self.ours += new
        self.theirs += copies
        self.largest += [0.0] * len(new)
        options = self.honoured({**self.program["options"], **group["options"]})
        options.pop("initial_accumulator_value", None)  # torch heeds the constructor's alone
        return (new, copies), options

    def add_group(self, group):
        (new, copies), options = self.group(group)
        self.a.add_param_group({"params": new, **options})
        self.b.add_param_group({"params": copies, **options})

    def place(self, t, layout, fill=7.0):
        """A copy in memory that is watched."""
        buffer = Buffer([(t.detach().resolve_conj().resolve_neg(), layout)], fill)
        self.buffers.append(buffer)
        return buffer.tensors[0]

    def at(self, which):
        """Indices of the parameters that are meant: one, or all."""
        return range(len(self.ours)) if which is None else [which % len(self.ours)]

    def states(self, which):
        """Our and their states that have tensors."""
        pairs = [(self.a.state.get(self.ours[i]), self.b.state.get(self.theirs[i])) for i in self.at(which)]
        return [(s, t) for s, t in pairs if s and t and tensors(s)]

    # ------------------------------------------------------------------- gradients

    def fill(self, which, seed, kind, scale, layout):
        for i in self.at(which):
            p = self.ours[i]
            g = values(p.shape, p.dtype, seed + i, scale)
            if kind == "zero":
                g.zero_()
            if kind == "in place" and p.grad is not None and not fusedopt.memory.overlaps(p.grad):
                p.grad.copy_(g)
            else:
                self.set_gradient(p, self.laid(g, kind, p, layout))
            self.theirs[i].grad = wide(p.grad)

    def laid(self, g, kind, p, layout):
        if kind == "expanded" and g.dim():
            return g[:1].expand(g.shape) if g.shape[0] else g
        if kind == "like":
            return torch.empty_like(p).copy_(g)
        g = Buffer([(lazy(g, kind, start=True), layout)], fill=math.nan).tensors[0]
        return lazy(g, kind)

    def set_gradient(self, p, g):
        if p.grad is not None:
            self.kept = [*self.kept[-8:], (p.grad, bits(p.grad))]
        p.grad = g

    def no_gradient(self, which):
        for i in self.at(which):
            self.set_gradient(self.ours[i], None)
            self.theirs[i].grad = None

    def zero_grad(self, to_none):
        for p in self.ours:
            if p.grad is not None and fusedopt.memory.overlaps(p.grad):
                p.grad = p.grad.clone()
        self.a.zero_grad(set_to_none=to_none)
        self.b.zero_grad(set_to_none=to_none)

    def poison(self, which, seed, value):
        """One element of a gradient is not finite."""
        for i in self.at(which):
            p, q = self.ours[i], self.theirs[i]
            if p.numel():
                g = values(p.shape, p.dtype, seed) if p.grad is None else p.grad.resolve_conj().resolve_neg().clone()
                g = g.contiguous()
                # Both parts of a complex number: one of them becomes NaN in torch where arithmetic is complex.
                g.view(-1)[seed % g.numel()] = complex(*[float(value)] * 2) if g.is_complex() else float(value)
                self.set_gradient(p, g)
                q.grad = wide(g)

    # --------------------------------------------------------------------- options

    def set(self, index, key, value, kind):
        index %= len(self.a.param_groups)
        group, other = self.a.param_groups[index], self.b.param_groups[index]
        value = self.honoured({**group, key: value})[key]
        if kind != "number":
            made = torch.tensor(value, dtype=getattr(torch, kind))
            value = tuple(made) if isinstance(value, list) else made
        group[key], other[key] = value, value if kind == "number" else number(value)

    def clip(self, norm):
        self.a.max_grad_norm = norm

    def skip(self, yes):
        self.a.skip_nonfinite = yes


class Operations(Training):
    """What may happen besides: to the whole optimizer, to memory and to states."""

    def load(self, how):
        if how == "new":
            old = self.a
            self.make_ours([{"params": list(group["params"])} for group in old.param_groups])
            self.a.max_grad_norm, self.a.skip_nonfinite = old.max_grad_norm, old.skip_nonfinite
            self.skipped = 0
            self.a.load_state_dict(old.state_dict())
        elif how == "file":
            self.a.load_state_dict(through_file(self.a.state_dict()))
        elif how == "same":
            self.a.load_state_dict(self.a.state_dict())
        if how.startswith("to torch"):
            saved = through_file(self.a.state_dict())
            saved["state"] = {i: state for i, state in saved["state"].items() if state}  # torch's Adagrad wants none
            self.b.load_state_dict(saved)
            for group in self.b.param_groups:
                numbers = {key: number(value) for key, value in group.items() if key in ("lr", "betas")}
                group.update(numbers, foreach=False)
            for state in self.b.state.values():  # torch leaves complex states as they were
                state.update({key: wide(state[key]) for key in tensors(state)})
        if how in ("from torch", "to torch and back"):
            self.a.load_state_dict(through_file(self.b.state_dict()))

    def copy(self, how):
        """Go on with a copy, whose gradients are not copied."""
        new = copy.deepcopy(self.a) if how == "deepcopy" else pickle.loads(pickle.dumps(self.a))
        pairs = zip(self.a.param_groups, new.param_groups, strict=True)
        found = {id(p): q for g, h in pairs for p, q in zip(g["params"], h["params"], strict=True)}
        self.kept += [(p, bits(p)) for p in self.ours]
        self.kept += [(s[key], bits(s[key])) for s in self.a.state.values() for key in tensors(s)]
        self.a, self.ours = new, [found[id(p)] for p in self.ours]
        for p, q in zip(self.ours, self.theirs, strict=True):
            p.grad = q.grad = None

    def relist(self, index, how):
        for optimizer in (self.a, self.b):
            group = optimizer.param_groups[index % len(optimizer.param_groups)]
            params = list(group["params"])
            if how == "dicts":
                optimizer.param_groups = [dict(g) for g in optimizer.param_groups]
                optimizer.state = defaultdict(dict, {p: dict(s) for p, s in optimizer.state.items()})
            elif how == "reversed":
                group["params"] = params[::-1]
            elif how == "list" or optimizer is self.a:
                group["params"] = tuple(params) if how == "tuple" else params

    # ---------------------------------------------------------------------- memory

    def move(self, which, how, layout):
        for i in self.at(which):
            p, q = self.ours[i], self.theirs[i]
            old = p.data
            if how == "swap":
                other = torch.nn.Parameter(self.place(p, layout))
                other.grad = p.grad
                torch.utils.swap_tensors(p, other)
                old = other.data
            elif how == "transpose":
                if is_square(p):
                    p.data, q.data = p.data.t(), q.data.t().contiguous()
                continue
            else:
                p.data = self.moved(p.data, how, layout)
            self.kept.append((old, bits(old)))

    def moved(self, t, how, layout):
        if how == "lazy":
            return torch._lazy_clone(t)
        return lazy(self.place(lazy(t, how, start=True), layout), how)

    def flatten(self, dtype, layout):
        """All parameters of a dtype become parts of one buffer."""
        alike = [p for p in self.ours if p.dtype == getattr(torch, dtype)]
        if alike:
            self.buffers.append(Buffer([(p.data.resolve_conj().resolve_neg(), layout) for p in alike]))
            for p, t in zip(alike, self.buffers[-1].tensors, strict=True):
                self.kept.append((p.data, bits(p)))
                p.data = t

    # ---------------------------------------------------------------------- states

    def replace_state(self, which, number, how, layout):
        for ours, theirs in self.states(which):
            key = tensors(ours)[number % len(tensors(ours))]
            old = ours[key].data
            if how == "transpose":
                if is_square(old):
                    # Centered, the variance is a difference: both parts of it, or it may fall below zero.
                    is_part = "grad_avg" in ours and key != "momentum_buffer"
                    for part in ("square_avg", "grad_avg") if is_part else (key,):
                        ours[part].data, theirs[part].data = ours[part].data.t(), theirs[part].data.t().contiguous()
                continue
            self.kept.append((old, bits(old)))
            if how == "data":
                ours[key].data = self.moved(old, how, layout)
            else:
                ours[key] = self.moved(old, how, layout)

    def cast_state(self, which, number, how, dtype):
        dtype = getattr(torch, dtype)
        for ours, theirs in self.states(which):
            key = tensors(ours)[number % len(tensors(ours))]
            old = ours[key]
            if old.is_complex():
                to = torch.complex64 if dtype == torch.float32 else torch.complex128
            else:
                to = dtype
            group = next(g for g in self.a.param_groups if any(self.a.state.get(p) is ours for p in g["params"]))
            if group.get("centered"):
                continue  # its variance is a difference, which does not survive this
            if key in EXACT and to not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
                continue
            new = old.detach().resolve_conj().resolve_neg().to(to, copy=True)
            if how == "entry":
                ours[key] = new
            elif how == "data":
                old.data = new
            elif old.dim() and old.stride(-1) == 1 and old.is_contiguous() and to.itemsize < old.element_size():
                view = old.data.resolve_conj().resolve_neg().view(to)[..., :: old.element_size() // to.itemsize]
                old.data = view.copy_(new)
            else:
                continue
            theirs[key].copy_(wide(new))

    def forget(self, which, how):
        for i in self.at(which):
            p = self.ours[i]
            self.b.state.pop(self.theirs[i], None)
            if how == "delete":
                self.a.state.pop(p, None)
            elif how == "clear":
                self.a.state[p].clear()
            else:
                self.a.state[p] = {}

    def recount(self, which, kind):
        for ours, _ in self.states(which):
            for key in SCALARS:
                if key in ours and (key == "step" or kind.startswith("float")):
                    ours[key] = counter(float(ours[key]), kind)


def lazy(t, kind, start=False):
    """A tensor with the same numbers, of which torch remembers that they are to be negated or conjugated.

    Args:
        t: The tensor.
        kind: Which, or anything else for neither.
        start: Return what is to be negated or conjugated for that, instead of doing so.
    """
    if kind == "conjugated" and t.is_complex():
        return t.conj().resolve_conj() if start else t.conj()
    if kind == "negated" and not t.is_complex():
        return -t if start else torch._neg_view(t)
    return t


def is_square(t):
    return t.dim() == 2 and t.shape[0] == t.shape[1]


def counter(value, kind):
    if kind in ("int", "float"):
        return {"int": int, "float": float}[kind](value)
    if kind == "one element":
        return torch.tensor([value])
    return torch.tensor(value, dtype=getattr(torch, kind))


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
