"""FusedOptimizer: what all optimizers share. One step is a scan, and one launch per device."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt import checks, engines, options, planner, rescaling
from fusedopt.amp import TakesScaling
from fusedopt.averages import KeepsAverages
from fusedopt.checkpoint import KeepsState
from fusedopt.clipping import Clips, Measured
from fusedopt.compiling import leave_alone
from fusedopt.engines import Stepping
from fusedopt.interrupts import held_back
from fusedopt.launch import Scaling, forks, launch, threads_that_exist
from fusedopt.planner import NewState
from fusedopt.plans import Planned, Plans
from fusedopt.ranks import Ranks, are_there, settle_gradients
from fusedopt.rule import Rule
from fusedopt.sums import Joint

ProcessGroup = Any  # torch.distributed's, which not every build of torch has
ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_OWN = ("max_grad_norm", "skip_nonfinite", "process_group", "handles_amp", "engine", "scope", "rule")


def arguments(given: dict[str, Any], **fixed: Any) -> dict[str, Any]:
    """What a subclass's ``__init__`` was given, as arguments of FusedOptimizer's.

    Args:
        given: Its ``locals()``, before anything else is among them. What it does not take has its default.
        fixed: Options of the groups that it does not take.
    """
    own = {name: given[name] for name in _OWN if name in given}
    options = {name: value for name, value in given.items() if name not in ("self", "params", "__class__", *own)}
    return {"defaults": {**options, **fixed}, **own}


class FusedOptimizer(TakesScaling, Clips, KeepsAverages, KeepsState, torch.optim.Optimizer):
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
    rules: ClassVar[tuple[type[Rule], ...]] = ()  # others that an argument can choose
    steps_together: str = ""  # why parameters cannot be stepped one by one, if they cannot
    increments_versions: bool = True
    _in_backward: Any = None  # see fusedopt/backward.py
    _numbers: list[int] | None = None  # of the parameters in another optimizer that this is a part of

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
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
        self.scope = checks.scope(self.rule, scope)
        engines.require(engine)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.process_group = process_group
        self.handles_amp = handles_amp
        self.engine = engine
        self._skipped = 0
        self._measured = Measured()
        self._kept = Plans()
        self._scaler: weakref.ref[Any] | None = None
        self._statuses: dict[tuple[torch.device, int], Any] = {}
        self._retained: list[Any] = []
        self._lock, self._forks = threading.RLock(), forks()
        super().__init__(params, defaults)  # type: ignore[arg-type]
        leave_alone(FusedOptimizer, "_step_with")

    # ---------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; it is stepped from the next step on.

        Args:
            param_group: ``params``, and any options that differ from the defaults.

        Raises:
            ValueError: If an option is outside its domain, or a parameter is given twice.
            TypeError: If something is not of a type that torch.optim takes.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
            checks.new_parameters(param_group["params"], self.param_groups)
        super().add_param_group(param_group)
        try:
            options.settle(self.param_groups[-1], f" (group {len(self.param_groups) - 1})")
            options.settle_numbers(self.rule, self.param_groups[-1])
            checks.group(self.rule, param_group, len(self.param_groups) - 1)
            engines.check_group(self.engine, param_group, self.rule, self.scope)
        except Exception:
            self.param_groups.pop()
            raise

    # ------------------------------------------------------------------ step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If a gradient is sparse (SGD and Adagrad take such), or of another device, dtype or shape
                than its parameter. Nothing has changed then.
        """
        return self._step_with(closure)

    def _step_with(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        checks.options(self.max_grad_norm, self.skip_nonfinite, self.process_group, self.handles_amp)
        if self._forks != forks():  # the thread that had the lock may not be here
            self._lock, self._forks = threading.RLock(), forks()
        if self._lock._is_owned():  # pyright: ignore[reportAttributeAccessIssue]
            raise RuntimeError("step() was called inside of the same optimizer's step()")
        with self._lock, threads_that_exist():
            checks.not_averaged(self)
            self._step(self._scaling())
        return loss

    def _before_step(self) -> None:
        """What a subclass does once a closure has made the gradients."""

    def _step(self, scaling: Scaling) -> None:
        # What may run Python of the user's own comes before the scan, whose addresses are good until something does.
        max_norm, measures = self._max_norm(), self._measures()
        adds_up, rescales = measures or self.rule.has_sums(), rescaling.is_asked(self)
        planned = self._kept.find(self.param_groups)
        if planned is None or not planned.is_for(adds_up, self.process_group):
            self._refuse_capture()
            planned = None
        plans = planned.plans if planned else []
        # Sums come in the same order on all ranks, whatever each has planned; who they are must be known first.
        is_scaled = scaling.found_inf is not None and are_there()
        looks = planned is not None and (is_scaled or (adds_up and planned.ranks.matter))
        is_asynchronous = planned is not None and all(plan.asynchronous for plan in plans)
        new_state, outcome, request = NewState(), None, (scaling, max_norm, measures, self.skip_nonfinite)
        try:
            stands = planned is not None and (not looks or all(plan.scan() for plan in plans))
            ranks = planned.ranks if planned and stands else self._ranks()
            self._agree(scaling, ranks)
            if not stands:
                self._settle(ranks)
            if not is_asynchronous and self._refuses(scaling, ranks, measures):
                return
            if planned:
                outcome = launch(plans, *request, *self._joint(plans, ranks), wait=False)
            if outcome is None and planned and not looks and ranks.have_dtensors:
                self._settle(ranks)
                outcome = launch(plans, *request, *self._joint(plans, ranks), wait=False)
            if outcome is None:
                self._refuse_capture()
                self._finish(plans)
                self._kept.drop()
                plans = []
                if planned and not looks:
                    ranks = self._ranks()
                    self._settle(ranks)
                if is_asynchronous and self._refuses(scaling, ranks, measures):
                    return
                plans = planner.plan(self, new_state, measures, ranks)
                self._check_place_of_norm()
                outcome = launch(plans, *request, *self._joint(plans, ranks), wait=bool(new_state))
                if outcome is None:
                    raise RuntimeError("a gradient, parameter or state changed while the step was being planned")
                if plans:
                    self._kept.keep(Planned(self.param_groups, plans, ranks, adds_up))
            norm, skipped = outcome
            self._tell_norm(norm if measures else None)
            if skipped:
                self._skipped += not any(plan.asynchronous for plan in plans)
                self._forget(new_state)
                return
            if self.increments_versions:
                for plan in plans:
                    plan.increment_versions()
            if rescales:
                rescaling.after_step(self, new_state)
        except BaseException:
            if new_state:
                with held_back():
                    stepped = {id(p) for plan in plans for p, _ in self.members(plan.stepped_members)}
                    self._forget([made for made in new_state if id(made[1]) not in stepped])
            raise
        finally:
            self._finish(plans)

    def _ranks(self) -> Ranks:
        return Ranks((p for group in self.param_groups for p in group["params"]), self.process_group)

    def _joint(self, plans: list[Any], ranks: Ranks) -> tuple[Ranks | None, Joint | None]:
        """With whom a step on plans is done together, and what they join."""
        many = ranks if ranks.are_many else None
        return many, Joint.of(self.rule, self.scope, self.param_groups, many, plans)

    def _settle(self, ranks: Ranks) -> None:
        if ranks.have_dtensors:
            settle_gradients(p for group in self.param_groups if not group["differentiable"] for p in group["params"])

    def _finish(self, plans: list[Any]) -> None:
        """A step on plans is over."""
        for plan in plans:
            plan.finish()

    def _refuse_capture(self) -> None:
        """A step that must plan cannot be captured: it makes states and tables, and waits for devices."""
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            engines.refuse_capture(device)

    def _forget(self, new_state: NewState) -> None:
        """Take back states that were made for a step that did not happen."""
        if new_state:
            self._kept.drop()
        for _, p, names in new_state:
            state = self.state.get(p, {})
            for name in names:
                state.pop(name, None)
            if not state:
                self.state.pop(p, None)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped. Waits for the device."""
        return self._skipped + max((int(v.skipped_steps) for v in self._statuses.values()), default=0)

    @property
    def engines(self) -> tuple[Stepping, ...]:
        """What stepped in the last step, as (name, device, parameters), the last a number; empty before the first."""
        places = [(plan.name, p.device) for plan in self._plans or () for p, _ in self.members(plan.members)]
        return tuple(Stepping(*place, n) for place, n in Counter(places).items())

    @property
    def _plans(self) -> list[Any] | None:
        """Those of the last step; None if it left none."""
        return self._kept.last and self._kept.last.plans

    def members(self, which: Sequence[int]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters, counted through all groups, with their groups."""
        everyone = [(p, group) for group in self.param_groups for p in group["params"]]
        return [everyone[i] for i in which]

    def number_of(self, i: int) -> int:
        """Which of the optimizer's parameters one is, for what is drawn at random; given its number here."""
        return i if self._numbers is None else self._numbers[i]

    def status(self, device: torch.device, nth: int) -> Any:
        """Where the nth plan on a device tells whether its steps were skipped, and the norm."""
        if (device, nth) not in self._statuses:
            self._statuses[device, nth] = engines.StepStatus(device)
        return self._statuses[device, nth]

    def retain(self, plan: Any) -> None:
        """Hold a plan for as long as the optimizer lives: a graph may launch on its tables."""
        if not any(plan is retained for retained in self._retained):
            self._retained.append(plan)

    # ----------------------------------------------------------------- state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        leave_alone(FusedOptimizer, "_step_with")
        for g, group in enumerate(self.param_groups):
            options.settle(group, f" (group {g})")
        self._kept = Plans()
        self.__dict__.setdefault("_scaler", None)
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("handles_amp", True)
        self.__dict__.setdefault("scope", self.rule.scopes[0])
        self.__dict__.setdefault("_lock", threading.RLock())
        self.__dict__.setdefault("_forks", forks())
        self.__dict__.setdefault("_statuses", {})
        self.__dict__.setdefault("_retained", [])
        self.__dict__.setdefault("_measured", Measured())
        if (norm := self.__dict__.pop("_norm", None)) is not None:
            self._tell_norm(norm)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in (*_OWN, "increments_versions") if name in self.__dict__}
        measured = self._measured
        norm = float(measured.norm) if measured.norm is not None and measured.is_told else None
        return {**super().__getstate__(), **own, "_skipped": self.skipped_steps, "_norm": norm}
