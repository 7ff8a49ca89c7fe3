"""MBF: momentum by the inverse of the mini-blocks of the Fisher matrix."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from fusedopt import checks, storage
from fusedopt.aliases import Group, ParamGroup, ParamsT, ProcessGroup, StateDict, Tensors, Values
from fusedopt.callers import stack_level
from fusedopt.context import Context, StepRequest
from fusedopt.engines import refuse_capture
from fusedopt.optimizer import arguments
from fusedopt.optimizers.blocks import FISHER, INVERSE, Blocks, block_size, blocked, check_blocks, cut
from fusedopt.optimizers.parts import InParts, tensor_of
from fusedopt.optimizers.two_launches import AFTER, Launches
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import DECOUPLED, Hyper, Hypers, Rule, Scalars, State, States, bias_correction
from fusedopt.stepper import Stepper, Told

BLOCKS, DIAGONAL = "blocks", "diagonal"


class MBFRule(Rule):
    """The three parts of a step, see two_launches.py: diagonal blocks; momentum; what inverses made of it."""

    name = "mbf"
    hyper: Hypers = (Hyper("momentum"), Hyper("beta", high=1.0, high_open=True), Hyper("damping", low_open=True))
    settings: Hypers = (Hyper("inverse_every", low=1.0, whole=True), Hyper("max_block_size", whole=True))
    states: States = (State("momentum_buffer"), State("exp_avg_sq", signed=False), State("block_momentum"))
    scalars: Scalars = {"step": 0.0}
    decay = DECOUPLED
    replaces = "block_momentum"

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            momentum=h.momentum,
            beta=h.beta,
            one_minus_beta=1 - h.beta,
            scale=1 / bias_correction(h.beta, s.step),
            damping=h.damping,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        if "momentum_buffer" in state:
            b = c.momentum * state["momentum_buffer"] + g
            v = c.beta * state["exp_avg_sq"] + c.one_minus_beta * (g * g)
            return b / (c.scale * v + c.damping), {"momentum_buffer": b, "exp_avg_sq": v}
        if "block_momentum" in state:
            return g, {"block_momentum": c.momentum * state["block_momentum"] + g}
        return g, {}

    @classmethod
    def active_states(cls, group: Group) -> tuple[State, ...]:
        own = {DIAGONAL: cls.states[:2], BLOCKS: cls.states[2:], AFTER: ()}
        return own[group["algorithm"]]

    @classmethod
    def variants(cls) -> tuple[tuple[str, ...], ...]:
        return ("momentum_buffer", "exp_avg_sq"), ("block_momentum",), ()

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        if group["algorithm"] not in (BLOCKS, DIAGONAL, AFTER):
            return f"algorithm is {group['algorithm']!r}; it may be 'blocks' or 'diagonal'"
        if group["algorithm"] == BLOCKS and group["differentiable"]:
            return "differentiable=True is not for parameters with blocks, through whose inverses no gradient goes"
        return None


class BlockLaunches(Launches):
    """Steps an MBF."""

    of_function: str = BLOCKS
    kept: tuple[str, ...] = ("block_momentum", storage.scale_of("block_momentum"))
    made_of: tuple[str, ...] = ()

    def function(self, numbered: Sequence[tuple[int, Tensor, Group]]) -> Blocks:
        """Averages and inverses of blocks; see ``Launches.function``."""
        labels = checks.labels(self._whole.param_groups)
        for number, p, _ in numbered:
            why = "has no blocks" if not block_size(p) else cut(p)
            if why:
                raise ValueError(
                    f"{labels[number]} {why}, and its group says algorithm='blocks'; say 'diagonal' of its group"
                )
        members = [blocked(number, p) for number, p, _ in numbered]
        return Blocks(members, MBFRule.states[2], self.context, self._whole)

    def step(self, request: StepRequest) -> Told:
        """Do a step; see ``Launches``. It cannot be captured: when blocks are inverted, the host decides."""
        for device in {p.device for p, group in self._whole.everyone() if group["algorithm"] == BLOCKS}:
            refuse_capture(device)
        return super().step(request)


class MBF(InParts):
    """Momentum times the inverse of the Fisher matrix, of which small blocks along the diagonal are kept.

    A kernel of a convolution, with one input and one output, is a block of k elements (9 of 3 x 3), with gradient g:
    ``F <- beta F + (1-beta) g g^T``, ``b <- momentum b + g``, and
    ``p <- (1 - lr weight_decay) p - lr (F / (1 - beta^t) + damping I)^-1 b``. The rows of a matrix have one block
    together, of the mean of ``g g^T`` over them. Inverses are those of the first step, and of every
    ``inverse_every``-th after it. Outer products are those of the mean gradient, which ``backward()`` leaves. F is 0
    before the first step.

    What has no blocks is stepped as if each element were one, inverted in every step:
    ``v <- beta v + (1-beta) g^2``, ``p <- (1 - lr weight_decay) p - lr b / (v / (1 - beta^t) + damping)``. These are
    parameters of fewer than two dimensions, complex ones, and those whose blocks would have more than
    ``max_block_size`` elements on a side, of which a warning tells. A group says as ``algorithm`` which it is, "blocks"
    or "diagonal". One that does not becomes one of each, if it has parameters of both kinds: schedulers see two groups
    then. Embeddings are matrices, too: say "diagonal" of them.

    The state of a parameter with blocks has ``fisher`` and ``fisher_inverse``, of shape (out, in, k, k), or (in, in) of
    a matrix, float32 or wider: 72 bytes for each element of a 3 x 3 kernel in float32. DTensors may be sharded
    along the dimensions that count blocks: 0 of matrices, 0 and 1 of convolutions. Blocks are inverted in float64; one
    that rounding has left without an inverse keeps that which it had, which is 0 at first. Steps cannot be captured in
    a CUDA graph.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        momentum: Momentum factor.
        beta: Decay rate of the blocks.
        damping: Added to their diagonals. The step is about as long as that of SGD with a learning rate of
            ``lr / damping`` where gradients are small beside its root.
        weight_decay: Decay coefficient, multiplied by ``lr``.
        inverse_every: Steps from one inversion to the next.
        max_block_size: The most elements of a row or kernel; a matrix's block has as many squared. It is looked at
            when a group is added.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``. What has blocks cannot be differentiable.

    Raises:
        ValueError: If a hyperparameter is outside its domain, or a group says "blocks" of what has none.

    Example:
        >>> optimizer = fusedopt.MBF(model.parameters(), lr=1e-2)

    Reference:
        Bahamou, Goldfarb and Ren, "A Mini-Block Fisher Method for Deep Neural Networks", AISTATS 2023, arXiv
        2202.04124.
    """

    rule: type[Rule] = MBFRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        beta: float = 0.9,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        inverse_every: int = 20,
        max_block_size: int = 1024,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        average: Average | None = None,
        gradient_noise: GradientNoise | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        cautious_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(locals()))

    def _parts(self, group: ParamGroup) -> list[ParamGroup]:
        number, algorithm = len(self.param_groups), group.get("algorithm")
        if algorithm not in (None, BLOCKS, DIAGONAL):
            raise ValueError(f"algorithm (group {number}) is {algorithm!r}; it may be 'blocks', 'diagonal' or None")
        if algorithm == DIAGONAL:
            return [group]
        seen: set[int] = set()
        for i, member in enumerate(group["params"]):
            if id(tensor_of(member)) in seen:
                raise ValueError(f"parameter {i} of group {number} is given twice, which what has blocks cannot be")
            seen.add(id(tensor_of(member)))
        most = checks.number(group.get("max_block_size", self.defaults["max_block_size"]), "max_block_size", "")
        fit: list[bool] = []
        for i, member in enumerate(group["params"]):
            p = tensor_of(member)
            size = block_size(p) if isinstance(p, Tensor) else 0
            fit.append(0 < size <= most)
            if fit[-1] or not isinstance(p, Tensor):
                continue
            label = checks.Label({"param_names": {i: member[0]} if isinstance(member, tuple) else None}, number, i, p)
            if algorithm == BLOCKS:
                why = f"would have blocks of {size}, more than max_block_size {most:g}" if size else "has no blocks"
                raise ValueError(f"{label} {why}, and its group says algorithm='blocks'; say 'diagonal' of its group")
            if size:
                warnings.warn(
                    f"{label} would have blocks of {size}, more than max_block_size {most:g}; it is stepped by the "
                    "diagonal of its Fisher matrix",
                    stacklevel=stack_level(),
                )
        if all(fit) or not any(fit):
            return [{**group, "algorithm": BLOCKS if all(fit) else DIAGONAL}]
        parts = ([m for m, f in zip(group["params"], fit, strict=True) if f == of] for of in (True, False))
        return [
            {**group, "params": part, "algorithm": kind} for part, kind in zip(parts, (BLOCKS, DIAGONAL), strict=True)
        ]

    def _stepper_of(self, context: Context) -> Stepper:
        return BlockLaunches(context)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state; see ``fusedopt.FusedOptimizer.load_state_dict``.

        Raises:
            ValueError: If it does not fit, blocks among what does not. Nothing has changed then.
        """
        places = [(p, key) for saved, group in zip(state_dict.get("param_groups", ()), self.param_groups, strict=False)
                  for key, p in zip(saved["params"], group["params"], strict=False)]  # fmt: skip
        for (p, key), label in zip(places, checks.labels(self.param_groups), strict=False):
            state = state_dict.get("state", {}).get(key, {})
            if {FISHER, INVERSE, "block_momentum"} & state.keys():
                check_blocks(p, state, lambda label=label: label)
        super().load_state_dict(state_dict)
