"""The Trainer of transformers and Accelerators: the losses of torch's optimizers, clipping in the step."""

import math
import os
import warnings

import pytest
import torch
from helpers import close

import fusedopt

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'fusedopt[clients]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torchao's sources, where that is installed
    transformers.Trainer  # noqa: B018 - imported when it is first asked for

from accelerate import Accelerator  # noqa: E402

from fusedopt.integrations.transformers import FusedClipping, fuse_clipping  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("transformers"),  # whose import takes seconds
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
LR = 1e-2


class FusedTrainer(FusedClipping, transformers.Trainer):
    """As the documents have it."""


class Net(torch.nn.Module):
    """What Trainer asks of a model: a loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = torch.nn.Embedding(32, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 32)

    def forward(self, input_ids, labels):
        logits = self.head(self.norm(self.embed(input_ids)).cumsum(1))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def a_net():
    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 32, (8,), generator=generator) for _ in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(cls, folder, optimizer=None, net=None, **options):
    """A Trainer of a net on the CPU that logs every step."""
    net = a_net() if net is None else net
    options = {"max_steps": 8, "save_strategy": "no", "max_grad_norm": 0.3, **options}
    kind = {"optimizer_cls_and_kwargs": optimizer} if isinstance(optimizer, tuple) else {}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True, learning_rate=LR,
        disable_tqdm=True, seed=0, lr_scheduler_type="linear", **options,
    )  # fmt: skip
    kind = kind or {"optimizers": (optimizer(net), None)}
    return cls(net, arguments, train_dataset=data(), **kind)


def ours(net):
    return fusedopt.AdamW(net.parameters(), lr=LR)


def theirs(net):
    return torch.optim.AdamW(net.parameters(), lr=LR, fused=True)


def logged(trainer):
    trainer.train()
    keys = ("loss", "grad_norm", "learning_rate")
    return torch.tensor([[h[key] for key in keys] for h in trainer.state.log_history if "loss" in h])


@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"warmup_steps": 4}],
    ids=lambda options: next(iter(options), "clip"),
)
def test_trainer_logs_what_it_logs_with_torchs(tmp_path, options):
    """Losses, norms of the same step, and rates."""
    a = logged(trainer(FusedTrainer, tmp_path, ours, **options))
    b = logged(trainer(transformers.Trainer, tmp_path, theirs, **options))
    assert a.shape == (8, 3)
    close(a, b, 1e-3 if "bf16" in options else 1e-5)


def test_trainer_makes_no_pass_over_gradients(tmp_path, monkeypatch):
    for name in ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(torch.nn.utils, name, lambda *args, **kwargs: pytest.fail("a pass over the gradients"))
    assert logged(trainer(FusedTrainer, tmp_path, ours)).isfinite().all()
    existing = trainer(transformers.Trainer, tmp_path, ours, max_grad_norm=0)
    fuse_clipping(existing.accelerator)
    assert logged(existing).isfinite().all()


def test_trainer_takes_a_class_and_its_arguments(tmp_path):
    kind = (fusedopt.AdamW, {"lr": LR, "betas": (0.9, 0.95), "state_dtype": torch.bfloat16})
    assert logged(trainer(FusedTrainer, tmp_path, kind, weight_decay=0.1)).isfinite().all()


@pytest.mark.parametrize("cls", [transformers.Trainer, FusedTrainer], ids=["plain", "fused"])
def test_a_resumed_trainer_goes_on_bit_for_bit(tmp_path, cls):
    straight = trainer(cls, tmp_path / "straight", ours)
    straight.train()
    first = trainer(cls, tmp_path / "saved", ours, save_strategy="steps", save_steps=3)
    first.train()
    second = trainer(cls, tmp_path / "saved", ours)
    second.train(resume_from_checkpoint=os.path.join(tmp_path, "saved", "checkpoint-3"))
    for other in (first, second):
        assert all(map(torch.equal, straight.model.parameters(), other.model.parameters()))


def test_a_checkpoint_of_torchs_is_resumed(tmp_path):
    trainer(transformers.Trainer, tmp_path, theirs, save_strategy="steps", save_steps=4).train()
    resumed = trainer(FusedTrainer, tmp_path, ours)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "checkpoint-4"))
    straight = trainer(transformers.Trainer, tmp_path, theirs)
    straight.train()
    for p, q in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        close(p, q)


def steps(make, clip, *, fuses, scaler=None, bad=(), accumulate=1, n=6):
    """Parameters, norms and rates of a loop as accelerate's documents have it; some gradients are not finite."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    accelerator.scaler = scaler
    net = a_net()
    optimizer = make(net)
    if fuses:
        fuse_clipping(accelerator)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    net, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
    norms, rates = [], []
    for t, batch in enumerate(data()[: n * accumulate]):
        with accelerator.accumulate(net):
            loss = net(**{key: value[None] for key, value in batch.items()})["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if t in bad:
                    next(net.parameters()).grad[0] = math.inf
                norm = accelerator.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            if accelerator.sync_gradients:
                norms.append(float(norm))
                assert accelerator.optimizer_step_was_skipped == (t in bad)
                rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
            optimizer.zero_grad()
    return [p.detach() for p in net.parameters()], norms, rates, optimizer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerator_clips_as_with_torchs(accumulate):
    a, norms, rates, optimizer = steps(ours, 0.2, fuses=True, accumulate=accumulate)
    b, their_norms, their_rates, _ = steps(theirs, 0.2, fuses=False, accumulate=accumulate)
    for p, q in zip(a, b, strict=True):
        close(p, q, 1e-5)
    close(torch.tensor(norms), torch.tensor(their_norms), 1e-5)
    assert rates == their_rates
    assert optimizer.optimizer.grad_norm.item() == norms[-1]
    assert optimizer.optimizer.max_grad_norm is None


def test_a_skipped_step_is_known_to_the_accelerator_and_its_schedule():
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    a, norms, rates, optimizer = steps(ours, 0.2, fuses=True, scaler=scaler, bad=(2, 3))
    assert scaler.get_scale() == 64.0
    assert [math.isnan(norm) for norm in norms] == [False, False, True, True, False, False]
    assert rates[1:5] == [rates[1], rates[2], rates[2], rates[2]]  # the schedule has waited
    steps_taken = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    assert steps_taken == {4.0}


@pytest.mark.parametrize("why", ["norm", "some", "others", "sharded"])
def test_what_is_not_the_optimizers_norm_is_clipped_by_the_accelerator(why):
    accelerator = Accelerator(cpu=True)
    fuse_clipping(accelerator)
    net = a_net()
    optimizer = accelerator.prepare(theirs(net) if why == "others" else ours(net))
    net(**{key: value[None] for key, value in data()[0].items()})["loss"].backward()
    parameters = list(net.parameters())[1 if why == "some" else 0 :]
    kind = math.inf if why == "norm" else 2.0
    truth = torch.nn.utils.get_total_norm([p.grad for p in parameters], kind)
    if why == "sharded":
        accelerator.state.distributed_type = type(accelerator.distributed_type)("MEGATRON_LM")
    try:
        norm = accelerator.clip_grad_norm_(parameters, 1e-3, norm_type=kind)
    finally:
        accelerator.state.distributed_type = type(accelerator.distributed_type)("NO")
    close(norm, truth)
    close(torch.nn.utils.get_total_norm([p.grad for p in parameters], kind), torch.tensor(1e-3), 1e-5)
    assert why == "others" or optimizer.optimizer._measured.next_limit is None
