"""What torchtitan and its like ask of an optimizer: everything in the groups, and names that survive."""

import copy
import inspect

import pytest
import torch
from helpers import EVERY, close

import fusedopt

OWN = ("self", "params", "max_grad_norm", "skip_nonfinite", "process_group", "handles_amp", "engine", "scope", "rule")
# What chooses the rule, or is of the whole optimizer.
OF_THE_WHOLE = {
    "Adam": ("bias_correction",),
    "AdamW": ("bias_correction",),
    "KoalaM": ("measurement",),
    "KoalaV": ("measurement",),
    "Muon": ("adamw",),
    "NSGD": ("norm", "granularity", "collector"),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_hyperparameter_may_be_a_key_of_a_group(name):
    """With what the constructor would have made of it."""
    cls = getattr(fusedopt, name)
    p = torch.nn.Parameter(torch.ones(3, 2))
    usual = cls([p])
    keys = set(inspect.signature(cls).parameters) - {*OWN, *OF_THE_WHOLE.get(name, ())}
    assert keys <= set(usual.param_groups[0]) | {"average", "gradient_noise", "state_dtype", "master"} | {
        "cautious_weight_decay"
    }
    options = {key: usual.param_groups[0][key] for key in keys if key in usual.param_groups[0]}
    ours = cls([{"params": [p], "param_names": ["weight"], **options, "lr": 0.125}])
    group = ours.state_dict()["param_groups"][0]
    assert group["lr"] == 0.125 and group["param_names"] == ["weight"]
    assert {key: group[key] for key in options if key != "lr"} == {k: v for k, v in options.items() if k != "lr"}


def test_options_of_fusedopt_may_be_keys_of_a_group_too():
    p, q = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    optimizer = fusedopt.AdamW(
        [
            {"params": [("p", p)], "state_dtype": torch.bfloat16, "average": fusedopt.EMA(0.9)},
            {"params": [("q", q)], "gradient_noise": fusedopt.GradientNoise(0.1), "cautious_weight_decay": True},
        ]
    )
    p.grad, q.grad = torch.ones(300), torch.ones(300)
    optimizer.step()
    assert (
        optimizer.state[p]["exp_avg"].dtype == torch.bfloat16 and optimizer.state[q]["exp_avg"].dtype == torch.float32
    )
    names = [group["param_names"] for group in copy.deepcopy(optimizer).state_dict()["param_groups"]]
    assert names == [["p"], ["q"]]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group["param_names"] for group in optimizer.param_groups] == names


def test_its_container_trains_saves_and_resumes():
    titan = pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not installed")

    class Fused(titan.OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name):
            return getattr(fusedopt, name)

    def group(pattern, **options):
        return titan.ParamGroupConfig(
            pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={"lr": 0.02, "betas": (0.9, 0.95), **options}
        )

    def build(cls, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        config = titan.OptimizersContainer.Config(
            param_groups=[group("bias", weight_decay=0.0), group(".*", weight_decay=0.1, **options)]
        )
        return model, cls(config, model_parts=[model])

    def train(model, container, steps):
        losses = []
        for t in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
            loss = (model(x) - x[:, :1]).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            container.step()
            container.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    (ours, a), (theirs, b) = build(Fused), build(titan.OptimizersContainer)
    close(train(ours, a, range(5)), train(theirs, b, range(5)), 1e-5)
    saved, weights = copy.deepcopy(a.state_dict()), copy.deepcopy(ours.state_dict())
    straight = train(ours, a, range(5, 10))
    resumed, c = build(Fused)
    resumed.load_state_dict(weights)
    c.load_state_dict(saved)
    assert torch.equal(train(resumed, c, range(5, 10)), straight)
    assert all(map(torch.equal, resumed.parameters(), ours.parameters()))
    narrow, d = build(Fused, state_dtype=torch.bfloat16)
    train(narrow, d, range(2))
    assert {state["exp_avg"].dtype for o in d for state in o.state.values()} == {torch.float32, torch.bfloat16}
