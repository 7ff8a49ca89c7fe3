"""Rules of the tests alone, which add up over every scope; their C++ is in rules/, their Triton in triton_rules.py."""

from types import SimpleNamespace

from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.rule import DECOUPLED, EPS, RULE, WEIGHT_DECAY, Hyper, Rule, State

MOMENTUM = Hyper("momentum")


class ChannelRule(Rule):
    """Momentum of gradients that are normalised in each channel, by what their tensor has, too."""

    name = "channel"
    hyper = (MOMENTUM, EPS)
    states = (State("momentum_buffer"),)
    scalars = {"step": 0.0}
    decay = DECOUPLED
    scopes = ("channel",)
    measures = ("param", "grad")

    @staticmethod
    def prepare(h, s, new_state):
        return SimpleNamespace(momentum=h.momentum, eps=h.eps, weight=1 / s.step, scale=0.0)

    @staticmethod
    def measure(p, g, state, c):
        return p * p + 1, g * g

    @staticmethod
    def score(c, m):
        return c.weight * m.param / (1 + m.grad)

    @staticmethod
    def finish(c, s, m):
        c.scale = (2 + m.largest / (1 + m.whole.param)) / (m.grad**0.5 + c.eps) / (1 + m.whole.grad**0.5)

    @staticmethod
    def direction(p, g, state, c):
        buffer = c.momentum * state["momentum_buffer"] + c.scale * g
        return buffer, {"momentum_buffer": buffer}


class SharingRule(Rule):
    """Gradients by a level that a scope has in common, and by what a tensor has of the largest one there."""

    name = "sharing"
    hyper = (MOMENTUM,)
    scalars = {"step": 0.0, "level": 1.0}
    shared = ("level",)
    decay = DECOUPLED
    scopes = ("group", "all")
    measures = ("grad",)

    @staticmethod
    def prepare(h, s, new_state):
        return SimpleNamespace(momentum=h.momentum, scale=1 / s.step)

    @staticmethod
    def measure(p, g, state, c):
        return (g * g,)

    @staticmethod
    def score(c, m):
        return m.grad * c.scale

    @staticmethod
    def finish(c, s, m):
        s.level = c.momentum * s.level + (1 - c.momentum) * m.whole.grad**0.5
        c.scale = (1 + m.grad * c.scale) / (1 + m.largest) / (1 + s.level)

    @staticmethod
    def direction(p, g, state, c):
        return c.scale * g, {}


class ConcludingRule(Rule):
    """Gradients by how far the last step went, and whether it went along its gradient."""

    name = "concluding"
    hyper = (MOMENTUM,)
    states = (State("momentum_buffer"),)
    scalars = {"step": 0.0, "length": 0.0, "along": 0.0}
    decay = DECOUPLED
    scopes = ("tensor", "group", "all")
    epilogue = ("length", "along")

    @staticmethod
    def prepare(h, s, new_state):
        return SimpleNamespace(momentum=h.momentum, scale=(1 + abs(s.along)) / (1 + s.length) / s.step)

    @staticmethod
    def direction(p, g, state, c):
        buffer = c.momentum * state["momentum_buffer"] + c.scale * g
        return buffer, {"momentum_buffer": buffer}

    @staticmethod
    def conclude(p, g, d, state, c):
        return d * d + 1, d * g + 0 * p


class LayerRule(Rule):
    """Momentum of gradients over a running norm of each tensor, which is a scalar of its state."""

    name = "layer"
    hyper = (MOMENTUM, Hyper("beta"), EPS, WEIGHT_DECAY)
    states = (State("momentum_buffer"),)
    scalars = {"step": 0.0, "norm_sq": 0.0}
    decay = RULE
    measures = ("grad",)

    @staticmethod
    def prepare(h, s, new_state):
        return SimpleNamespace(
            momentum=h.momentum, beta=1.0 if new_state else 1 - h.beta, eps=h.eps, decay=h.weight_decay, scale=0.0
        )

    @staticmethod
    def measure(p, g, state, c):
        return (g * g,)

    @staticmethod
    def finish(c, s, m):
        s.norm_sq = s.norm_sq + c.beta * (m.grad - s.norm_sq)
        c.scale = 1 / (s.norm_sq**0.5 + c.eps)

    @staticmethod
    def direction(p, g, state, c):
        buffer = c.momentum * state["momentum_buffer"] + c.scale * g + c.decay * p
        return buffer, {"momentum_buffer": buffer}


def _optimizer(of):
    class Adding(FusedOptimizer):
        rule = of

        def __init__(
            self,
            params,
            lr=0.01,
            momentum=0.9,
            beta=0.9,
            eps=1e-8,
            weight_decay=0.1,
            *,
            maximize=False,
            foreach=None,
            capturable=False,
            differentiable=False,
            fused=None,
            max_grad_norm=None,
            skip_nonfinite=False,
            process_group=None,
            handles_amp=True,
            engine="auto",
            scope=None,
        ):
            super().__init__(params, **arguments(locals()))

    Adding.__name__ = of.__name__.removesuffix("Rule")
    return Adding


Channel, Sharing, Concluding, Layer = map(_optimizer, (ChannelRule, SharingRule, ConcludingRule, LayerRule))
SCOPED = [(of, scope) for of in (Channel, Sharing, Concluding, Layer) for scope in of.rule.scopes]


LR, MU, BETA, EPSILON, WD = 0.01, 0.9, 0.9, 1e-8, 0.1


class Textbook:
    """One step in float64, from the equations above.

    Args:
        of: The optimizer's class.
        scope: Its scope.
        groups: Lists of float64 tensors, which are changed.
        grads: Their gradients; None without.
        states: Of each parameter, dicts.
        factor: Of the gradients.
    """

    def __init__(self, of, scope, groups, grads, states, factor=1.0):
        self.scope, self.states = scope, states
        self.flat = [(k, p) for k, group in enumerate(groups) for p in group]
        self.live = [i for i, g in enumerate(grads) if g is not None]
        self.g = {i: grads[i] * factor for i in self.live}
        for i in self.live:
            states[i]["step"] = states[i].get("step", 0) + 1
        {Channel: self.channel, Sharing: self.sharing, Concluding: self.concluding, Layer: self.layer}[of]()

    def of_scope(self, i):
        """The parameters that a parameter's sums are taken over."""
        flat = self.flat
        same = {"all": lambda j: True, "group": lambda j: flat[j][0] == flat[i][0]}.get(self.scope, lambda j: j == i)
        return list(filter(same, range(len(flat))))

    def with_gradient(self, i):
        """Those of them that are stepped."""
        return [j for j in self.of_scope(i) if j in self.g]

    def channel(self):
        for i in self.live:
            p, x = self.flat[i][1], self.states[i]
            n = len(p) if p.dim() > 1 else 1
            rows, slices = (t.reshape(n, t.numel() // max(n, 1)) for t in (p, self.g[i]))
            pp, gg = (rows**2 + 1).sum(1), (slices**2).sum(1)
            largest = (pp / x["step"] / (1 + gg)).max() if len(rows) else 0
            scale = (2 + largest / (1 + pp.sum())) / (gg.sqrt() + EPSILON) / (1 + gg.sum().sqrt())
            x["b"] = MU * x.get("b", 0) + (scale[:, None] * slices).reshape(p.shape)
            p.mul_(1 - LR * WD).sub_(LR * x["b"])

    def sharing(self):
        g, states = self.g, self.states
        squares = {i: float((g[i] ** 2).sum()) for i in self.live}
        before = [x.get("level") for x in states]
        for i, (_, p) in enumerate(self.flat):
            here = self.with_gradient(i)
            if not here or (i not in g and before[i] is None):
                continue
            known = [before[j] for j in self.of_scope(i) if before[j] is not None]
            level = MU * (known[0] if known else 1.0) + (1 - MU) * sum(squares[j] for j in here) ** 0.5
            states[i]["level"] = level
            if i in g:
                largest = max(squares[j] / states[j]["step"] for j in here)
                scale = (1 + squares[i] / states[i]["step"]) / (1 + largest) / (1 + level)
                p.mul_(1 - LR * WD).sub_(LR * scale * g[i])

    def concluding(self):
        g, states, is_alone = self.g, self.states, self.scope == "tensor"
        length, along, before = {}, {}, [(x.get("length"), x.get("along")) for x in states]
        for i in self.live:
            p, x = self.flat[i][1], states[i]
            known = [before[i]] if is_alone else [before[j] for j in self.of_scope(i) if before[j][0] is not None]
            a, b = known[0] if known and known[0][0] is not None else (0.0, 0.0)
            x["b"] = MU * x.get("b", 0) + (1 + abs(b)) / (1 + a) / x["step"] * g[i]
            p.mul_(1 - LR * WD).sub_(LR * x["b"])
            length[i], along[i] = float((x["b"] ** 2 + 1).sum()), float((x["b"] * g[i]).sum())
        for i in range(len(self.flat)):
            here = self.with_gradient(i)
            if here and (i in g or (before[i][0] is not None and not is_alone)):
                states[i]["length"], states[i]["along"] = (sum(v[j] for j in here) for v in (length, along))

    def layer(self):
        for i in self.live:
            p, x, g = self.flat[i][1], self.states[i], self.g[i]
            square = float((g**2).sum())
            x["norm_sq"] = x["norm_sq"] + (1 - BETA) * (square - x["norm_sq"]) if "norm_sq" in x else square
            x["b"] = MU * x.get("b", 0) + g / (x["norm_sq"] ** 0.5 + EPSILON) + WD * p
            p.sub_(LR * x["b"])
