"""The rules of KoalaV and KoalaM: a Kalman filter whose state are the parameters, and whose measurement is the loss."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.aliases import Tensors, Values
from fusedopt.rule import LR, RULE, WEIGHT_DECAY, Hyper, Hypers, Names, Rule, Scalars, Score, State, States

SHORTEST = 1e-9  # a tensor whose gradient is shorter is left out
NOISE = (Hyper("r"), Hyper("online", high=1.0))
MEASUREMENT = (Hyper("loss", low=-math.inf), Hyper("loss_square"), Hyper("measured", high=1.0))


class Koala(Rule):
    """What both are: ``h = g + wd p`` is the derivative by a tensor of a loss that was measured with noise R.

    The variance P of parameters makes a gain of ``P / S``, with ``S = P |h|^2 + R``.
    """

    decay = RULE
    scopes: Names = ("all",)
    measures: Names = ("grad", "slope", "param")

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        h = g + c.weight_decay * p
        return g * g, h * h, p * p

    @staticmethod
    def residual(m: Values, c: Values, variance: float) -> float:
        """What multiplies a variance to a gain: ``(loss + wd |p|^2 / 2) / S``; 0 of what is left out."""
        S = variance * m.slope + c.noise
        return (c.loss + 0.5 * c.weight_decay * m.param) / S if m.grad >= SHORTEST**2 and S > 0 else 0.0

    @staticmethod
    def noise_after(h: Values, noise: float) -> float:
        """That of the measurement after this step: fixed, or a running mean of the losses' squares."""
        if not h.online:
            return h.r
        return 0.9 * noise + 0.1 * h.loss_square if h.measured else noise


def information(m: Values, variance: float, noise: float) -> float:
    """``|h|^2 / S`` of a tensor; 0 of what is left out."""
    S = variance * m.slope + noise
    return m.slope / S if m.grad >= SHORTEST**2 and S > 0 else 0.0


def by_sigma(c: Values, m: Values) -> float:
    """What the tensor tells that tells most is what the variance shrinks by: KoalaV's score."""
    return information(m, c.sigma, c.noise)


def by_covariance(c: Values, m: Values) -> float:
    """KoalaM's."""
    return information(m, c.p00, c.noise)


class KoalaVRule(Koala):
    """``s <- s + q``, ``p <- p - lr s / S (loss + wd |p|^2 / 2) h``, ``s <- s - s^2 max |h|^2 / S`` over all tensors.

    With ``match_reference`` the step is along g, as in the authors' code.
    """

    name = "koalav"
    hyper: Hypers = (WEIGHT_DECAY, Hyper("q"), *NOISE, Hyper("match_reference", high=1.0), *MEASUREMENT)
    settings: Hypers = (Hyper("sigma"),)
    scalars: Scalars = {"step": 0.0, "sigma": "sigma", "noise": "r"}
    shared: Names = ("sigma", "noise")
    score: Score | None = by_sigma

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        if h.measured:
            s.sigma = s.sigma + h.q
        s.noise = Koala.noise_after(h, s.noise)
        return Values(
            weight_decay=h.weight_decay,
            sigma=s.sigma,
            noise=s.noise,
            loss=h.loss,
            measured=h.measured,
            gain=0.0,
            decay=0.0 if h.match_reference else h.weight_decay,
        )

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        if not c.measured:
            return
        c.gain = c.sigma * Koala.residual(m, c, c.sigma)
        c.decay = c.decay * c.gain
        if m.largest > 0:
            s.sigma = c.sigma * (1 - c.sigma * m.largest)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        return c.gain * g + c.decay * p, {}


PREDICTED: Hypers = (Hyper("drift"), Hyper("predictions"))


class KoalaMRule(Koala):
    """The same with a velocity u, and P of 2 by 2 with what both have in common.

    Predicted, ``p <- p + u``, ``u <- a u`` beforehand: ``qw <- 0.9 qw + 0.1 drift`` and
    ``P <- F P F' + diag(qw, qv)``, ``F = (1 1; 0 a)``. Then, with ``k = (loss + wd |p|^2 / 2) / S``:
    ``p <- p - lr P00 k h``, ``u <- u - lr P10 k h``, ``e <- 0.9 e + 0.1 p``, and
    ``P <- P - max |h|^2 / S P[:,0] P[:,0]'`` over all tensors.
    """

    name = "koalam"
    hyper: Hypers = (
        LR,
        WEIGHT_DECAY,
        Hyper("a"),
        Hyper("qv"),
        *NOISE,
        *MEASUREMENT,
        Hyper("drift"),
        Hyper("predictions"),
    )
    settings: Hypers = (Hyper("sw"), Hyper("sv"), Hyper("q"))
    states: States = (State("velocity"), State("average", exact=True))
    scalars: Scalars = {"step": 0.0, "p00": "sw", "p10": 0.0, "p11": "sv", "qw": "q", "noise": "r", "predictions": 0.0}
    shared: Names = ("p00", "p10", "p11", "qw", "noise", "predictions")
    score: Score | None = by_covariance

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        for _ in range(2):  # one, or two after steps that were skipped, until all are done
            if s.predictions >= h.predictions:
                break
            s.predictions += 1
            s.qw = 0.9 * s.qw + 0.1 * h.drift
            s.p00 = s.p00 + 2 * s.p10 + s.p11 + s.qw
            s.p10 = h.a * (s.p10 + s.p11)
            s.p11 = h.a * h.a * s.p11 + h.qv
        s.noise = Koala.noise_after(h, s.noise)
        return Values(
            lr=h.lr,
            weight_decay=h.weight_decay,
            p00=s.p00,
            p10=s.p10,
            p11=s.p11,
            noise=s.noise,
            loss=h.loss,
            measured=h.measured,
            gain=0.0,
            velocity_gain=0.0,
            follow=0.0,
        )

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        if not c.measured:
            return
        k = Koala.residual(m, c, c.p00)
        c.gain, c.velocity_gain = c.p00 * k, c.lr * c.p10 * k
        c.follow = 0.1 if m.grad >= SHORTEST**2 else 0.0
        if m.largest > 0:
            s.p00 = c.p00 * (1 - m.largest * c.p00)
            s.p10 = c.p10 * (1 - m.largest * c.p00)
            s.p11 = c.p11 - m.largest * c.p10 * c.p10

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        h = g + c.weight_decay * p
        d, e = c.gain * h, state["average"]
        return d, {"velocity": state["velocity"] - c.velocity_gain * h, "average": e + c.follow * (p - c.lr * d - e)}
