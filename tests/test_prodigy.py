"""Prodigy: against its authors' package in several groups, and what is d's. The gate judges its variants."""

import io
import math

import pytest
import torch
from helpers import assert_same, close, copies, fewer, params, snapshot

import fusedopt
from fusedopt.verification import oracles

SHAPES = [(5, 3), (7,), (40, 2), (6,)]


def pull(ps, t, missing=True):
    """Gradients towards ones; the second tensor has none now and then, and none at first."""
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(ps):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (p.detach() - 1 + 0.1 * noise).to(p.dtype)
        if missing and i == 1 and t % 5 in (0, 3):
            p.grad = None


def groups_of(ps):
    """Three, the last of which stands still."""
    still = {"lr": 0.0, "weight_decay": 0.0}
    return [{"params": ps[:2]}, {"params": ps[2:-1], "weight_decay": 0.1, "eps": 1e-6}, {"params": ps[-1:], **still}]


def theirs(groups, **options):
    cls = oracles.find("prodigyopt:Prodigy") or pytest.skip("needs prodigyopt")
    return cls(groups, **options)


def warm_up(optimizer, t, still=()):
    """From a first step without a rate; some groups stand still."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.0 if i in still else 0.1 * min(t, 10)


OPTIONS = [
    {},
    {"use_bias_correction": True, "betas": (0.8, 0.99)},
    {"safeguard_warmup": True, "d_coef": 2.0},
    {"beta3": 0.9},
    {"growth_rate": 1.5},
    {"decouple": False, "weight_decay": 0.01, "d0": 1e-4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_groups_step_as_the_package(engine, options):
    ours = params(*SHAPES, dtype=torch.float64)
    qs = copies(ours)
    a, b = fusedopt.Prodigy(groups_of(ours), engine=engine, **options), theirs(groups_of(qs), **options)
    ds = []
    for t in range(fewer(engine, 60)):
        for optimizer, its in ((a, ours), (b, qs)):
            warm_up(optimizer, t, still=(2,))
            pull(its, t)
            optimizer.step()
        ds.append(float(a.d))
        assert ds[-1] == pytest.approx(b.param_groups[0]["d"], rel=1e-5)
        for p, q in zip(ours, qs, strict=True):
            close(p.detach(), q.detach(), 1e-5)
    assert engine == "triton" or ds[-1] > 1e3 * options.get("d0", 1e-6)


@pytest.mark.parametrize("d0", [1e-6, 1e-3])  # float32 has a smaller one, and a larger
def test_growth_is_limited_once_d_has_left_d0(engine, d0):
    ps = params((50,))
    o = fusedopt.Prodigy(ps, d0=d0, growth_rate=1.01, engine=engine)
    ds = [float(torch.tensor(d0))]
    for t in range(8):
        pull(ps, t)
        o.step()
        ds.append(float(o.d))
    grown = [after / before for before, after in zip(ds, ds[1:], strict=False)]
    assert grown[0] == 1
    assert grown[1] > 1.5  # the first estimate
    assert all(1 <= g <= 1.01 + 1e-6 for g in grown[2:]) and grown[2] > 1.009


def test_a_resumed_run_has_the_same_d(engine):
    ps = params(*SHAPES)
    o = fusedopt.Prodigy(groups_of(ps), engine=engine, use_bias_correction=True)
    for t in range(4):
        pull(ps, t)
        o.step()
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    again = copies(ps)
    other = fusedopt.Prodigy(groups_of(again), engine=engine, use_bias_correction=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(o.d, other.d)
    for t in range(4, 8):
        for one, its in ((o, ps), (other, again)):
            pull(its, t)
            one.step()
    assert_same(snapshot(o), snapshot(other))


def test_d_is_one_for_all_and_can_be_read(engine):
    ps = params(*SHAPES)
    o = fusedopt.Prodigy(groups_of(ps), engine=engine, d0=1e-4)
    assert float(o.d) == pytest.approx(1e-4)
    for t in range(1, 5):
        pull(ps, t)
        o.step()
    d = o.d
    assert float(d) > 2e-4 and d.device == ps[0].device
    assert {float(o.state[p]["d"]) for p in ps} == {float(d)}
    before = d.clone()
    pull(ps, 5)
    o.step()
    assert torch.equal(d, before) and o.d > d


def test_late_parameters_have_the_others_d_and_a_first_value_of_their_own(engine):
    ps = params(*SHAPES)
    o = fusedopt.Prodigy(ps[:2], engine=engine, d0=1e-3, d_coef=0.5)
    for t in range(1, 5):
        pull(ps[:2], t)
        o.step()
    o.add_param_group({"params": ps[2:]})
    assert o.param_groups[1]["d_coef"] == 0.5
    first = ps[2].detach().clone()
    for t in range(5, 8):
        pull(ps, t)
        o.step()
    assert torch.equal(o.state[ps[2]]["p0"], first) and not torch.equal(ps[2], first)
    assert len({float(o.state[p]["d"]) for p in ps}) == 1


def test_a_step_that_is_skipped_leaves_d_and_the_first_value_alone(engine):
    ps = params((5,), (3, 2))
    o = fusedopt.Prodigy(ps, engine=engine, d0=1e-3, skip_nonfinite=True)
    pull(ps, 0)
    ps[0].grad[0] = math.nan
    o.step()
    with torch.no_grad():
        ps[0].mul_(2)
    first = ps[0].detach().clone()
    for t in range(1, 4):
        pull(ps, t, missing=False)
        o.step()
    assert torch.equal(o.state[ps[0]]["p0"], first)
    assert o.d > 1.1e-3
    before = snapshot(o)
    ps[1].grad[0, 0] = math.inf
    o.step()
    assert_same(snapshot(o), before)
    assert o.skipped_steps == 2


def test_nothing_moves_before_there_is_a_gradient(engine):
    """No decay either, and no step is counted."""
    ps = params((4,), (3,))
    o = fusedopt.Prodigy(ps, engine=engine, weight_decay=0.5, d0=0.1)
    before = [p.detach().clone() for p in ps]
    for _ in range(2):
        for p in ps:
            p.grad = torch.zeros_like(p)
        o.step()
    assert all(map(torch.equal, ps, before)) and float(o.state[ps[0]]["k"]) == 0
    pull(ps, 1)
    o.step()
    assert float(o.state[ps[0]]["k"]) == float(o.state[ps[1]]["k"]) == 1 and not torch.equal(ps[1], before[1])


def test_groups_without_a_rate_neither_move_nor_count(engine):
    """Not even by decay, or after they did; what their gradients are does not matter."""
    moving, still = params((6,)), params((3, 2))
    alone = copies(moving)
    o = fusedopt.Prodigy([{"params": moving}, {"params": still, "weight_decay": 0.5}], engine=engine, d0=1e-3)
    pull([*moving, *still], 1, missing=False)
    o.step()
    other = fusedopt.Prodigy([{"params": alone}, {"params": copies(still)}], engine=engine, d0=1e-3)
    other.load_state_dict(o.state_dict())
    with torch.no_grad():
        alone[0].copy_(moving[0])
    o.param_groups[1]["lr"] = other.param_groups[1]["lr"] = 0.0
    before, states = still[0].detach().clone(), {k: v.clone() for k, v in o.state[still[0]].items()}
    for t in range(2, 6):
        pull([*moving, *still], t, missing=False)
        still[0].grad.fill_(math.nan)
        pull(alone, t, missing=False)
        o.step(), other.step()
    assert torch.equal(still[0], before) and torch.equal(moving[0], alone[0])
    assert all(torch.equal(o.state[still[0]][name], states[name]) for name in ("s", "p0", "exp_avg", "exp_avg_sq"))


def test_other_rates_are_those_of_other_units(engine):
    """A quarter of the rate of p is the rate of 4 p; all sums are those of what is stepped at one rate."""
    ours, qs = params((6,), (3, 2), dtype=torch.float64), params((6,), (3, 2), dtype=torch.float64)
    with torch.no_grad():
        qs[0].copy_(ours[0])
        qs[1].copy_(4 * ours[1])
    a = fusedopt.Prodigy([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.25}], engine=engine, d0=1e-3)
    b = fusedopt.Prodigy([{"params": qs[:1]}, {"params": qs[1:], "eps": 0.25e-8}], engine=engine, d0=1e-3)
    for t in range(fewer(engine, 30)):
        pull(ours, t)
        qs[0].grad = ours[0].grad.clone()
        qs[1].grad = None if ours[1].grad is None else ours[1].grad / 4
        a.step(), b.step()
    assert a.d > 2e-3
    close(a.d, b.d, 1e-9)
    close(ours[0].detach(), qs[0].detach(), 1e-9)
    close(ours[1].detach(), qs[1].detach() / 4, 1e-9)


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_scopes_are_optimizers_of_their_own(engine, scope):
    ps = params(*SHAPES)
    qs = copies(ps)
    groups = [{"params": ps[:2], "d_coef": 0.5}, {"params": ps[2:]}]
    sets = (
        [(qs[:2], 0.5), (qs[2:], 1.0)] if scope == "group" else [([q], 0.5 if i < 2 else 1.0) for i, q in enumerate(qs)]
    )
    o = fusedopt.Prodigy(groups, engine=engine, scope=scope, d0=1e-3)
    others = [fusedopt.Prodigy(its, engine=engine, d0=1e-3, d_coef=d_coef) for its, d_coef in sets]
    for t in range(1, fewer(engine, 20) + 1):
        pull(ps, t)
        for p, q in zip(ps, qs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        o.step()
        for other in others:
            other.step()
    for p, q in zip(ps, qs, strict=True):
        close(p.detach(), q.detach(), 1e-6)
    assert len({float(o.state[p]["d"]) for p in ps}) == len(sets)


def test_beta3_is_the_root_of_beta2_unless_it_is_given(engine):
    ps = params((3,), (2,), (4,))
    o = fusedopt.Prodigy(ps[:1], betas=(0.9, 0.81), engine=engine)
    o.add_param_group({"params": ps[1:2], "beta3": None, "betas": (0.9, 0.99)})
    assert [group["beta3"] for group in o.param_groups] == [pytest.approx(0.9)] * 2
    assert fusedopt.Prodigy(ps[2:], beta3=0.5).param_groups[0]["beta3"] == 0.5
    of_groups = fusedopt.Prodigy([{"params": ps[:1]}, {"params": ps[1:], "betas": (0.9, 0.81)}], scope="group")
    assert of_groups.param_groups[1]["beta3"] == pytest.approx(0.9)


def test_what_is_ds_is_the_same_in_all_groups(engine):
    ps = params((3,), (2,))
    o = fusedopt.Prodigy(ps[:1], engine=engine, d0=1e-3)
    for key, value in (("d0", 1e-4), ("d_coef", 2.0), ("growth_rate", 1.1), ("beta3", 0.9)):
        with pytest.raises(ValueError, match=f"{key} is .* in one group and {value} in another"):
            o.add_param_group({"params": ps[1:], key: value})
    o.add_param_group({"params": ps[1:]})
    pull(ps, 1)
    o.step()
    before = snapshot(o)
    o.param_groups[1]["d_coef"] = 2.0
    with pytest.raises(ValueError, match="which share a d"):
        o.step()
    assert_same(snapshot(o), before)
    o.param_groups[0]["d_coef"] = 2.0
    o.step()


def test_domains(engine):
    (p,) = params((3,))
    for options, said in (
        ({"growth_rate": 0.99}, r"growth_rate .* must lie in \[1, inf\]"),
        ({"growth_rate": math.nan}, "growth_rate"),
        ({"d0": 0.0}, r"d0 .* must lie in \(0, inf\)"),
        ({"d0": math.inf}, "d0"),
        ({"d_coef": 0.0}, "d_coef"),
        ({"eps": 0.0}, "eps"),
        ({"beta3": 1.0}, "beta3"),
    ):
        with pytest.raises(ValueError, match=said):
            fusedopt.Prodigy([p], engine=engine, **options)


def test_an_infinite_limit_is_scanned(engine):
    """And needs no new plans."""
    ps = params((5,))
    o = fusedopt.Prodigy(ps, engine=engine)
    plans = []
    for t in range(3):
        pull(ps, t)
        o.step()
        plans.append(o._plans)
    assert plans[0] is plans[1] is plans[2]
    o.param_groups[0]["growth_rate"] = 0.5
    with pytest.raises(ValueError, match="growth_rate"):
        o.step()


def test_sums_and_first_values_keep_all_of_float32(engine):
    p = torch.nn.Parameter(torch.randn(64, 256).bfloat16())
    o = fusedopt.Prodigy([p], engine=engine, d0=1e-3, state_dtype="8bit", master="split")
    first = p.detach().clone()
    for t in range(3):
        pull([p], t)
        o.step()
    state = o.state[p]
    assert [state[name].dtype for name in ("s", "p0")] == [torch.float32] * 2
    assert [state[name].dtype for name in ("exp_avg", "exp_avg_sq")] == [torch.uint8] * 2
    assert torch.equal(state["p0"], first.float()) and o.d > 1e-3


def test_fuse_takes_over_from_the_package(engine):
    """A bias of zeros has one number as its first value there; other states are flat."""
    ours = [*params((5, 3), dtype=torch.float64), torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))]
    qs = copies(ours)
    live, b = (theirs([{"params": its[:1]}, {"params": its[1:]}], weight_decay=0.01) for its in (ours, qs))
    for t in range(6):
        for optimizer, its in ((live, ours), (b, qs)):
            pull(its, t)
            optimizer.step()
    assert live.state[ours[1]]["p0"].dim() == 0
    fused = fusedopt.fuse(live, engine=engine)
    assert float(fused.d) == pytest.approx(b.param_groups[0]["d"], rel=1e-6)
    for t in range(6, 12):
        for optimizer, its in ((fused, ours), (b, qs)):
            pull(its, t)
            optimizer.step()
    for p, q in zip(ours, qs, strict=True):
        close(p.detach(), q.detach(), 1e-6)
    with pytest.raises(ValueError, match="slice_p=11"):
        fusedopt.fuse(theirs(params((3,)), slice_p=11))


def test_fuse_keeps_first_values_where_there_is_no_first_moment(engine):
    (p,) = params((4,))
    live = theirs([p], betas=(0.0, 0.999))
    first = p.detach().clone()
    for t in range(2):
        pull([p], t)
        live.step()
    fused = fusedopt.fuse(live, engine=engine)
    pull([p], 2)
    fused.step()
    assert torch.equal(fused.state[p]["p0"], first) and not torch.equal(p, first)
