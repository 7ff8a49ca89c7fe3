"""FusedOptimizer: what all optimizers share. One step is a scan, and one launch per device."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fusedopt import checks, engines, options
from fusedopt.aliases import Arguments, ParamGroup, ParamsT, ProcessGroup, StateDict, is_group
from fusedopt.checkpoint import KeepsState
from fusedopt.clipping import Measured
from fusedopt.plans import Plans
from fusedopt.rule import Rule
from fusedopt.stepping import Steps

_OWN = ("max_grad_norm", "skip_nonfinite", "process_group", "handles_amp", "engine", "scope", "rule")


def arguments(taken: Arguments, **fixed: object) -> Arguments:
    """What a subclass's ``__init__`` has taken, as arguments of FusedOptimizer's.

    Args:
        taken: Its ``locals()``, before anything else is among them. What it does not take has its default.
        fixed: Options of the groups that it does not take.
    """
    own = {name: taken[name] for name in _OWN if name in taken}
    options = {name: value for name, value in taken.items() if name not in ("self", "params", "__class__", *own)}
    return {"defaults": {**options, **fixed}, **own}


class FusedOptimizer(Steps, KeepsState):
    """Base of all fusedopt optimizers; a drop-in ``torch.optim.Optimizer``.

    The whole step (unscale, clip by global norm, weight decay, moments, bias correction, write) is one
    launch for all tensors of all param groups on a device. Gradients are left as they are.

    Subclasses name their ``rule`` and pass these arguments on, as ``**arguments(locals())``:

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        defaults: Defaults of the group options.
        max_grad_norm: Clip the gradients' global L2 norm over all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` before ``step()`` does. None: don't.
        skip_nonfinite: Leave parameters, states and step counts untouched by a step whose gradients
            have a norm that is not finite, and count it in ``skipped_steps``.
        process_group: Ranks (a torch.distributed process group) that have other parameters, or other parts of these,
            where tensors do not show it: those of pipeline stages, FSDP1 or ZeRO. Their norms are added up, and a step
            is clipped, skipped or scaled back on all of them or on none. DTensors show of themselves how they are
            sharded.
        handles_amp: Whether a GradScaler hands its scale and what it found to ``step()``, which unscales and skips by
            itself, as torch's ``fused=True`` does. False: the scaler unscales, in the pass over the gradients in which
            it looks at them anyway, waits for what it found, and does not call ``step()`` where it skips.
        scope: Over what the rule's sums are taken, see fusedopt/rule.py; of rules that leave it open.
        rule: Steps in place of the class's own, one of its ``rules``.
        engine: ``"auto"`` takes the fastest engine for each parameter; or the name of one, which then
            must be able to step every parameter. See ``fusedopt info``.

    Options that every group takes besides the rule's own:
        maximize: Ascend instead of descend.
        foreach, fused: Accepted for compatibility. In torch they choose an implementation; here there
            is one. As in torch, both being true is an error.
        capturable: Accepted; steps can always be captured where the engine is a GPU's.
        differentiable: Run the eager rule under autograd, so that gradients flow through the step.
        average: ``fusedopt.EMA`` or ``fusedopt.Lookahead``, an average of the parameters that the step keeps
            in their state; None for none. See ``averaged`` and ``average_of``.
        gradient_noise: ``fusedopt.GradientNoise`` that is added to the gradients; None for none.
        state_dtype: None (float32, or as wide as wider parameters), ``torch.bfloat16`` or ``"8bit"``: how the rule's
            states are stored. See docs/storage.md, also for ``master``.
        master: Of bfloat16 parameters ``"fp32"``, ``"split"`` (16 bits more, which with the parameter are its float32
            master) or ``"stochastic"`` (rounded at random); of float16 ones ``"fp32"``; None for none.
        rescale: A key of groups alone: put the parameters to unit length after the step, by "channel" (a slice of
            dimension 0), "tensor", or "all" tensors that say so as one, in every ``rescale_every``-th step, unless lr
            is 0; see ``fusedopt.scale_invariant_groups``.
        cautious_weight_decay: Decay only where the step goes towards zero, too: where update times parameter is not
            negative (Chen et al., "Cautious Weight Decay", arXiv 2510.12402). Decay must be decoupled.

    Attributes:
        grad_norm: The gradients' global L2 norm in the last step, before clipping and after unscaling, as a 0-dim
            tensor on the first parameter's device: the same one, which every step fills; clone it to keep a number.
            None unless clipping or ``skip_nonfinite`` ask for it. Not finite after a step that a GradScaler refused.
        increments_versions: Whether autograd is told that parameters were written, so that going backward through a
            graph from before the step is an error, as with torch's optimizers. False saves some nanoseconds a tensor.
        skipped_steps: How many steps were skipped, by ``skip_nonfinite`` or by a GradScaler.

    On a GPU nothing here waits for the device but reading ``skipped_steps`` and the value of ``grad_norm``, the first
    step of a parameter, steps that need a plan, and one that finds the device four steps behind whose gradients or
    hyperparameters were others than those of the step before. Steps can be captured in a CUDA graph, once one step was
    done outside of it; whatever is a tensor on the device, such as lr, can change between replays. A graph must not
    outlive its optimizer, whose tables it reads; and replays do not count float32 steps beyond 2**24.

    A hyperparameter that is a tensor on another device than the parameter is read by the host, which waits for it. Of
    several devices, those before one on which a launch fails have stepped.

    ``grad_norm`` has the same bits every time on one device with one build, not on another.

    States of bfloat16 and float16 parameters are float32, unless ``state_dtype`` asks for less, or they were loaded as
    something else. How much memory each way to store them takes is said in docs/storage.md.

    ``torch.compile`` leaves ``step()`` as it is: a compiled training step has one graph break there.

    Threads that step one optimizer wait for one another. In a forked child, as DataLoader's workers are, a step runs
    on one thread. A step that a signal handler interrupts has happened as a whole, or not at all.

    DTensors are stepped as the parts that each rank has; their states are DTensors placed like them, and the norm is
    that of the whole. A gradient that is placed otherwise than its parameter, such as a partial sum, is replaced by one
    of the same value that is placed like it. All ranks must step where gradients are measured.

    Parameters that share memory, or have gradients in one another's, and one that is given twice (torch warns of it),
    are stepped one after the other in their order, as torch does it. A parameter's own gradient is read before anything
    of it is written.

    Raises:
        ValueError: For a hyperparameter outside its domain, a parameter of two groups, an unknown engine.
        TypeError: For a hyperparameter that is no number, or something else as process group.
    """

    rule: type[Rule]
    rules: tuple[type[Rule], ...] = ()  # others that an argument can choose, or that the class steps by besides
    steps_together: str = ""  # why parameters cannot be stepped one by one, if they cannot
    increments_versions: bool = True
    of_all: tuple[str, ...] = ()  # keys of groups that are the same in all, also in those that are added later
    _in_backward: object = None  # what steps in backward, if anything does

    def __init__(
        self,
        params: ParamsT,
        defaults: ParamGroup,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
        scope: str | None = None,
        rule: type[Rule] | None = None,
    ) -> None:
        if rule is not None:
            self.rule = rule
        checks.options(max_grad_norm, skip_nonfinite, process_group, handles_amp)
        self.scope: str = checks.scope(self.rule, scope)
        engines.require(engine)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.process_group = process_group
        self.handles_amp = handles_amp
        self.engine = engine
        self._measured = Measured()
        self._scaler: weakref.ref[torch.amp.GradScaler] | None = None
        super().__init__(params, defaults)
        self._get_ready()

    # ---------------------------------------------------------------- groups

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; it is stepped from the next step on.

        Args:
            param_group: ``params``, and any options that differ from the defaults.

        Raises:
            ValueError: If an option is outside its domain, or a parameter is given twice.
            TypeError: If something is not of a type that torch.optim takes.
        """
        if is_group(param_group) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
            checks.new_parameters(param_group["params"], self.param_groups)
        if is_group(param_group):
            for group in self.param_groups[:1]:
                param_group.update({key: group[key] for key in self.of_all})
        super().add_param_group(param_group)
        try:
            options.settle(self.param_groups[-1], f" (group {len(self.param_groups) - 1})")
            options.settle_numbers(self.rule, self.param_groups[-1])
            checks.group(self.rule, param_group, len(self.param_groups) - 1)
            engines.check_group(self.engine, param_group, self.rule, self.scope)
        except Exception:
            self.param_groups.pop()
            raise

    # ----------------------------------------------------------------- state

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for g, group in enumerate(self.param_groups):
            options.settle(group, f" (group {g})")
        own = self.__dict__
        if "_stepper" in own:  # the state was loaded
            self._stepper.plans = Plans()
            return
        defaults = {"_scaler": None, "process_group": None, "handles_amp": True, "scope": self.rule.scopes[0]}
        own.update({**defaults, **own}, _measured=Measured())
        self._get_ready()
        self._stepper.skipped = own.pop("_skipped", 0)
        if (norm := own.pop("_norm", None)) is not None:
            self._tell_norm(norm)

    def __getstate__(self) -> StateDict:
        own = {name: self.__dict__[name] for name in (*_OWN, "increments_versions") if name in self.__dict__}
        measured = self._measured
        norm = float(measured.norm) if measured.norm is not None and measured.is_told else None
        return {**super().__getstate__(), **own, "_skipped": self.skipped_steps, "_norm": norm}
