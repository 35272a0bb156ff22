"""Lightning's Trainer that prunes between its epochs trains as one does by hand: iterate, carry, go on."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import taylorfx as tfx
from taylorfx.interop import carry, reschedule

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()  # lightning imports it where it is installed

pytest.importorskip("lightning")

from lightning import pytorch as pl

from taylorfx.callbacks.lightning import PruneCallback

X, Y = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
BUDGETS = [tfx.Flops(0.8), tfx.Flops(0.6)]


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3))))


class Lit(pl.LightningModule):
    """A network, and a temperature that is trained along."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.temperature = Images(), nn.Parameter(torch.ones(3))

    def training_step(self, batch, number):
        return cross_entropy(self.model(batch[0]) * self.temperature, batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 6)


def trainer(folder, callbacks=(), **options):
    options = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[*callbacks], **options,
    )  # fmt: skip


def by_hand(lit, params, spec):
    """The same without Lightning."""
    plan = lit.configure_optimizers()
    optimizer, schedule = plan["optimizer"], plan["lr_scheduler"]
    steps = None
    lit.train()
    for epoch in range(3):
        for batch in loader():
            optimizer.zero_grad()
            lit.training_step(batch, 0).backward()
            optimizer.step()
        if epoch < len(BUDGETS):
            now = tfx.tree.unflatten({path: lit.model.state_dict()[path] for path in spec.shapes})
            if steps is None:
                held = tfx.interop.holdable(lit.model, now, spec, X[:3])
                steps = tfx.iterate(now, spec, (X, Y), budgets=BUDGETS, constraints=held)
            else:
                steps.send(now)
            params, spec, plan = next(steps)
            small, others = tfx.to_torch(params, spec, like=lit.model), {"temperature": lit.temperature}
            old, new = ({**dict(module.named_parameters()), **others} for module in (lit.model, small))
            optimizer = carry(optimizer, plan, new, old=old)
            lit.model, schedule = small, reschedule(schedule, optimizer)
        schedule.step()
    return optimizer


def test_training_with_the_callback_is_the_loop_by_hand_to_the_last_bit(tmp_path):
    lit = Lit()
    expected = copy.deepcopy(lit)
    params, spec = tfx.from_torch(lit.model, X)
    prune, whole = PruneCallback(params, spec, (X, Y), budgets=BUDGETS), lit.model
    run = trainer(tmp_path, [prune], enable_checkpointing=True)
    torch.manual_seed(1)
    run.fit(lit, loader())
    torch.manual_seed(1)
    optimizer = by_hand(expected, params, spec)
    assert lit.model is whole
    assert len(prune.plans) == 2
    assert lit.model.a.out_channels < 12
    assert str(lit.model) == str(expected.model)
    for path, x in expected.state_dict().items():
        assert torch.equal(lit.state_dict()[path], x), path
    assert str(run.optimizers[0].state_dict()) == str(optimizer.state_dict())
    saved = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert {path: x.shape for path, x in saved.items()} == {path: x.shape for path, x in lit.state_dict().items()}


def test_what_cannot_be_pruned_in_a_run_is_refused_before_anything_is_trained(tmp_path):
    lit = Lit()
    params, spec = tfx.from_torch(lit.model, X)
    before = copy.deepcopy(lit.state_dict())
    with pytest.raises(ValueError, match=r"2 budgets, .* take 4 epochs; there are 3"):
        trainer(tmp_path, [PruneCallback(params, spec, (X, Y), budgets=BUDGETS, every=2)]).fit(lit, loader())
    wrapped = SimpleNamespace(world_size=1, model=nn.Sequential(lit))  # as DDP does
    with pytest.raises(ValueError, match="received one on 1, with the module as Sequential"):
        PruneCallback(params, spec, (X, Y), budgets=BUDGETS).on_train_start(wrapped, lit)
    with pytest.raises(AttributeError, match="network"):
        trainer(tmp_path, [PruneCallback(params, spec, (X, Y), budgets=BUDGETS, module="network")]).fit(lit, loader())
    assert all(torch.equal(x, before[path]) for path, x in lit.state_dict().items())
