"""Lightning: the losses of torch's optimizers in every loop, and clipping in the step in every precision."""

import copy
import math

import pytest
import torch
from helpers import close

import fusedopt

lightning = pytest.importorskip(
    "lightning.pytorch", reason="lightning is not installed: pip install 'fusedopt[clients]'"
)

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from fusedopt.integrations.lightning import FusedClipping  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
]


class Module(lightning.LightningModule):
    """A regression whose losses, norms and rates are kept."""

    bad = ()

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.make, self.seen, self.norms = make, [], []

    def training_step(self, batch, index):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.seen.append(float(loss))
        return loss * (math.inf if index in self.bad else 1)

    def configure_optimizers(self):
        optimizer = self.make(self.net)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *_):
        self.norms.append(float(getattr(self.optimizers(), "grad_norm", None) or math.nan))


class Fused(FusedClipping, Module):
    """As the documents have it."""


class Manual(Module):
    """The loop in the module's own hands."""

    def __init__(self, make):
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        self.clip(optimizer)
        optimizer.step()

    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")


class FusedManual(FusedClipping, Manual):
    """Clips in the step."""

    def clip(self, optimizer):
        self.configure_gradient_clipping(optimizer, 0.3)


def batches():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 6, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1] * 2), batch_size=4)


def scaled():
    """16-mixed, where there is no GPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))


def fit(module, folder, *, resume=None, epochs=1, **options):
    options = {"gradient_clip_val": 0.3, **options}
    if module.automatic_optimization is False:
        options = {}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, batches(), ckpt_path=resume)
    return trainer


def ours(net, **options):
    return fusedopt.AdamW(net.parameters(), lr=1e-2, **options)


def theirs(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def assert_close(a, b, tolerance=1e-5):
    close(torch.tensor(a.seen), torch.tensor(b.seen), tolerance)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(p, q, tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": None},
        {"gradient_clip_val": 0},
        {"gradient_clip_algorithm": "norm"},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_losses_are_those_with_torchs(tmp_path, options):
    a, b = Fused(ours), Module(theirs)
    fit(a, tmp_path, **options)
    fit(b, tmp_path, **options)
    assert len(a.seen) == 8
    assert_close(a, b, 1e-3 if options.get("precision") == "bf16-mixed" else 1e-5)
    by_norm = options.get("gradient_clip_val", 0.3) == 0.3
    assert all(math.isfinite(norm) == by_norm for norm in a.norms[3:])


@pytest.mark.parametrize("handles_amp", [True, False])
def test_16_mixed_clips_and_skips(tmp_path, handles_amp):
    a, b = Fused(lambda net: ours(net, handles_amp=handles_amp)), Module(theirs)
    a.bad = b.bad = (2, 5)
    optimizers = []
    for module in (a, b):
        plugin = scaled()
        trainer = fit(module, tmp_path, plugins=[plugin])
        optimizers += trainer.optimizers
        assert plugin.scaler.get_scale() == 64.0
    assert_close(a, b, 1e-3)
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {6.0}
    assert optimizers[0].skipped_steps == (2 if handles_amp else 0)


def test_without_the_mixin_handles_amp_is_what_lightning_wants(tmp_path):
    a, b = Module(lambda net: ours(net, handles_amp=False)), Module(theirs)
    for module in (a, b):
        fit(module, tmp_path, plugins=[scaled()])
    assert_close(a, b, 1e-3)


@pytest.mark.parametrize("cls", [Manual, FusedManual])
def test_manual_optimization(tmp_path, cls):
    a, b = cls(ours), Manual(theirs)
    fit(a, tmp_path)
    fit(b, tmp_path)
    assert_close(a, b)
    assert len(a.norms) == 8 and all(map(math.isfinite, a.norms)) == (cls is FusedManual)


def test_no_pass_over_the_gradients(tmp_path, monkeypatch):
    for name in ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(torch.nn.utils, name, lambda *args, **kwargs: pytest.fail("a pass over the gradients"))
    module = Fused(ours)
    fit(module, tmp_path)
    assert all(map(math.isfinite, module.norms))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_resumes_bit_for_bit(tmp_path, precision):
    options = {"plugins": [scaled()]} if precision == "16-mixed" else {}
    straight, first, second = Fused(ours), Fused(ours), Fused(ours)
    fit(straight, tmp_path, epochs=2, **copy.deepcopy(options))
    fit(first, tmp_path, **copy.deepcopy(options)).save_checkpoint(tmp_path / "saved.ckpt")
    fit(second, tmp_path, epochs=2, resume=tmp_path / "saved.ckpt", **copy.deepcopy(options))
    assert len(second.seen) == 8 and second.seen == straight.seen[8:]
    assert all(map(torch.equal, straight.parameters(), second.parameters()))


def test_a_wrapper_clips_what_it_wraps():
    """Attributes of LightningOptimizer's own shadow the optimizer's."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([p], lr=1.0)
    wrapper = LightningOptimizer(optimizer)
    p.grad = torch.full((4,), 5.0)
    norm = wrapper.clip_next_step(1.0)
    optimizer.step()
    close(norm, torch.tensor(10.0))
    close(p, torch.full((4,), 0.5), 1e-6)
    assert wrapper.grad_norm is optimizer.grad_norm is norm
