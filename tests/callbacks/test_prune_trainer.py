"""A Trainer of transformers that prunes between its epochs trains as one does by hand: iterate, carry, go on."""

import copy
import importlib.util
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.interop import carry, huggingface, reschedule

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

import transformers

from taylorfx.callbacks.trainer import PruneCallback

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = [{"x": x, "labels": label} for x, label in zip(X, torch.arange(24) % 3, strict=True)]
BATCH = X, torch.arange(24) % 3
BUDGETS = [tfx.Flops(0.8), tfx.Flops(0.6)]


class Classifier(nn.Module):
    """As the Trainer wants it: the loss among the outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 12)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(12, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.drop(self.b(self.norm(self.a(x)).relu()).relu()))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def loss(outputs, labels):
    return cross_entropy(outputs["logits"], labels)


def made():
    torch.manual_seed(0)
    model = Classifier().double()
    return model, *tfx.from_torch(model, X, outputs=["logits"])


def optimizers(model):
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)


def trainer(folder, model, callbacks=(), given=(None, None), data=DATA, **arguments):
    arguments = {
        "num_train_epochs": 3, "per_device_train_batch_size": 6, "use_cpu": True, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "max_grad_norm": 1.0, **arguments,
    }  # fmt: skip
    return transformers.Trainer(
        model, transformers.TrainingArguments(str(folder), **arguments), train_dataset=data,
        eval_dataset=data, optimizers=given, callbacks=[*callbacks],
    )  # fmt: skip


def by_hand(model, params, spec, loader, epochs=3):
    """The same without a callback: what `iterate` hands out is made a module, and the optimizer is carried to it."""
    optimizer, scheduler = optimizers(model)
    steps = None
    for epoch in range(epochs):
        model.train()
        for batch in loader:
            model(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if epoch < len(BUDGETS):
            now = tfx.tree.unflatten({path: dict(model.state_dict())[path] for path in spec.shapes})
            if steps is None:
                held = tfx.interop.holdable(model, now, spec, X[:3])
                steps = tfx.iterate(now, spec, BATCH, budgets=BUDGETS, loss=loss, constraints=held)
            else:
                steps.send(now)
            params, spec, plan = next(steps)
            small = tfx.to_torch(params, spec, like=model)
            optimizer = carry(optimizer, plan, small, old=model)
            model, scheduler = small, reschedule(scheduler, optimizer)
    return model, optimizer


def test_training_with_the_callback_is_the_loop_by_hand_to_the_last_bit(tmp_path):
    model, params, spec = made()
    whole = copy.deepcopy(model)
    prune = PruneCallback(params, spec, BATCH, budgets=BUDGETS, loss=loss)
    run = trainer(tmp_path, model, [prune], optimizers(model))
    loader = trainer(tmp_path, copy.deepcopy(whole)).get_train_dataloader()
    torch.manual_seed(1)
    run.train()
    torch.manual_seed(1)
    expected, optimizer = by_hand(whole, params, spec, loader)
    assert run.model is model
    assert expected.a.out_features < 16
    assert str(model) == str(expected)
    for path, x in expected.state_dict().items():
        assert torch.equal(model.state_dict()[path], x), path
    assert str(run.optimizer.state_dict()) == str(optimizer.state_dict())
    assert len(prune.plans) == 2
    assert (
        tfx.cost.flops(prune.plans[1].coupling)(prune.plans[1].keep)
        <= 0.6 * tfx.cost.flops(prune.plans[0].coupling).total
    )
    assert tfx.compose(*prune.plans).spec == prune.spec


TOKENS = torch.randint(60, (12, 10), generator=torch.Generator().manual_seed(0))
TEXTS = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text} for text in TOKENS]


def test_every_checkpoint_after_a_cut_is_a_folder_of_a_smaller_model(tmp_path):
    """In bfloat16 autocast, with a frozen table and a hook, which stay what they are; and a run goes on from there."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    calls = []
    model = transformers.LlamaForCausalLM(config)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model, params, spec = huggingface.from_pretrained(model, outputs="logits")
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}, TOKENS
    prune = PruneCallback(params, spec, [batch], budgets=[tfx.Parameters(0.9)], every=2, loss=huggingface.next_token)
    saving = {"save_strategy": "epoch", "bf16": True, "data": TEXTS}
    run = trainer(tmp_path, model, [prune], **saving)
    run.train()
    sizes = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{2 * k}").config.intermediate_size
        for k in (1, 2, 3)
    ]
    assert sizes[0] == 24 > sizes[1] == sizes[2] == model.config.intermediate_size
    last = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").eval()
    assert_close(last(TOKENS).logits, model.eval()(TOKENS).logits, rtol=2e-2, atol=2e-2)
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    calls.clear()
    model(TOKENS)
    assert calls == [1]


def llama(layers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return huggingface.from_pretrained(transformers.LlamaForCausalLM(config), outputs="logits")


def second_leaves(scores, coupling, *, budget, constraints, per_cost):
    """Of the layers that there are the second leaves, and one unit of every MLP."""
    del scores, budget, constraints, per_cost
    keep = np.ones(len(coupling), bool)
    second = sorted({coupling.names[one.unit].split(":")[0].split(".")[2] for one in coupling.branches})[1]
    for k, scope in enumerate(coupling.scopes):
        units = np.flatnonzero(coupling.scope == k)
        if f"layers.{second}." in scope if "branch" in scope else ".mlp: " in scope:
            keep[units[:1]] = False
    return tfx.Plan(coupling, coupling.settled(keep))


def test_whole_layers_leave_within_a_run_and_the_optimizer_follows(tmp_path):
    """States after one cut are those of a run without any, cut by its plan; at a rate of zero nothing is learned."""
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}, TOKENS
    states = []
    for cuts in (0, 1, 2):
        model, params, spec = llama(4)
        prune = PruneCallback(
            params, spec, [batch], budgets=[tfx.Parameters(0.999)] * cuts, loss=huggingface.next_token, branches=True,
            criterion=tfx.taylor, choose=second_leaves,
        )  # fmt: skip
        run = trainer(tmp_path, model, [prune], data=TEXTS, learning_rate=0.0, num_train_epochs=max(1, cuts))
        run.train()
        states.append({path: run.optimizer.state[x]["exp_avg"] for path, x in model.named_parameters()})
        assert model.config.num_hidden_layers == len(model.model.layers) == 4 - cuts
        assert model.config.intermediate_size == 24 - cuts
        model.eval()
        assert_close(model(**batch[0]).logits, tfx.apply(prune.params, prune.spec, batch[0])["logits"])
        run.save_model(str(tmp_path / "last"))
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last")
        assert_close(again(TOKENS).logits, model(TOKENS).logits)
        if cuts == 1:
            whole = tfx.tree.flatten(tfx.cut(tfx.tree.unflatten(states[0]), prune.plans[0]))
            for path, state in states[1].items():
                old = re.sub(r"(?<=layers\.)[12]", lambda found: str(int(found[0]) + 1), path)
                assert torch.equal(state, whole[old]), path
    assert [path for path in prune.spec.shapes if "layers.3." in path], "the spec goes on with its own names"
    assert tfx.compose(*prune.plans).spec == prune.spec


def test_layers_leave_by_the_loss_without_them_where_nothing_else_is_said(tmp_path):
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}, TOKENS
    model, params, spec = llama(4)
    budgets = [tfx.Parameters(0.5)]
    prune = PruneCallback(params, spec, [batch], budgets=budgets, loss=huggingface.next_token, branches=True)
    trainer(tmp_path, model, [prune], data=TEXTS, learning_rate=0.0, num_train_epochs=1).train()
    (plan,) = prune.plans
    assert tfx.cost.parameters(plan.coupling)(plan.keep) <= 0.5 * tfx.cost.parameters(plan.coupling).total
    assert model.config.num_hidden_layers == len(model.model.layers) <= 4
    model.eval()
    assert_close(model(**batch[0]).logits, tfx.apply(prune.params, prune.spec, batch[0])["logits"])


def test_branches_of_a_class_that_has_all_of_them_are_refused_when_training_begins(tmp_path):
    model, params, spec = made()
    prune = PruneCallback(params, spec, BATCH, budgets=BUDGETS, loss=loss, branches=True)
    with pytest.raises(tfx.interop.LikeError, match="received a Classifier and branches=True"):
        trainer(tmp_path, model, [prune]).train()


def test_a_run_goes_on_from_a_checkpoint_with_budgets_in_numbers(tmp_path):
    model, params, spec = made()
    run = trainer(
        tmp_path, model, [PruneCallback(params, spec, BATCH, budgets=BUDGETS, loss=loss)], save_strategy="epoch"
    )
    run.train()
    again = made()[0]
    for name, part in model.named_children():  # the model of the checkpoint: the smaller one
        setattr(again, name, copy.deepcopy(part))
    params, spec = tfx.from_torch(again, X, outputs=["logits"])
    total = tfx.cost.parameters(tfx.couple(params, spec)).total
    numbers = [tfx.Parameters(9_999), tfx.Parameters(9_999), tfx.Parameters(9_999), tfx.Parameters(total // 2)]
    goes_on = {"num_train_epochs": 4, "save_strategy": "epoch"}
    shares = PruneCallback(params, spec, BATCH, budgets=[0.9] * 4, loss=loss)
    with pytest.raises(ValueError, match="A share is of the network before anything was cut"):
        trainer(tmp_path, again, [shares], **goes_on).train(str(tmp_path / "checkpoint-12"))
    prune = PruneCallback(params, spec, BATCH, budgets=numbers, loss=loss)
    run = trainer(tmp_path, again, [prune], **goes_on)
    run.train(str(tmp_path / "checkpoint-12"))
    assert sum(x.numel() for x in again.parameters()) <= total // 2
    assert len(prune.plans) == 1
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {16}


def test_a_network_without_a_class_is_pruned_too(tmp_path):
    _, params, spec = made()
    model = tfx.to_torch(params, spec)
    model.get_submodule("a").weight.requires_grad_(False)
    prune = PruneCallback(params, spec, BATCH, budgets=BUDGETS, loss=loss, repair=tfx.compensate)
    run = trainer(tmp_path, model, [prune])
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch: loss(outputs, labels)
    run.train()
    assert model.spec == prune.spec
    assert len(prune.plans) == 2
    assert model(X)["logits"].shape == (24, 3)
    assert [path for path, x in model.named_parameters() if not x.requires_grad] == ["a.weight"]


REFUSED = {
    "too many budgets": ({"num_train_epochs": 1}, {}, ValueError, r"2 budgets, .* take 2 epochs; there are 1"),
    "an earlier model at the end": (
        {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}, {}, ValueError,
        "received load_best_model_at_end",
    ),
    "a compiled model": ({"torch_compile": True}, {}, ValueError, "received torch_compile"),
    "no epoch between": ({}, {"every": 0}, ValueError, "received every=0"),
    "a single budget": ({}, {"budgets": tfx.Flops(0.5)}, ValueError, r"received Flops\("),
    "an iterator": ({}, {"batches": iter([BATCH])}, ValueError, "received an iterator"),
    "an unknown option": ({}, {"criterium": tfx.fisher}, tfx.SelectionError, "received criterium"),
    "a constraint on nothing": (
        {}, {"constraints": tfx.Constraints(protect=["nowhere"])}, tfx.SelectionError, "nowhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_in_a_run_is_refused_before_anything_is_trained(name, tmp_path):
    arguments, options, kind, expected = REFUSED[name]
    model, params, spec = made()
    before, options = copy.deepcopy(model.state_dict()), {"batches": BATCH, "budgets": BUDGETS, "loss": loss, **options}
    with pytest.raises(kind, match=expected):
        trainer(tmp_path, model, [PruneCallback(params, spec, **options)], **arguments).train()
    assert all(torch.equal(x, before[path]) for path, x in model.state_dict().items())


def test_a_bias_that_a_repair_adds_is_refused_as_nothing_would_train_it(tmp_path):
    spec = tfx.serial(
        tfx.Input((6,)), a=tfx.layers.Linear(6, 8), act=tfx.layers.Tanh(), b=tfx.layers.Linear(8, 3, bias=False)
    )
    params = tfx.init(spec, torch.Generator().manual_seed(0), dtype=torch.float64)
    prune = PruneCallback(params, spec, BATCH, budgets=BUDGETS, repair=tfx.compensate)
    data = [{"input": row["x"], "labels": row["labels"]} for row in DATA]
    run = trainer(tmp_path, tfx.to_torch(params, spec), [prune], data=data, label_names=["labels"])
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch: cross_entropy(outputs, labels)
    with pytest.raises(tfx.interop.LikeError, match=r"A repair has added b\.bias to the network"):
        run.train()


def test_a_model_that_was_not_captured_is_refused(tmp_path):
    _, params, spec = made()
    other = nn.Linear(6, 3)
    with pytest.raises(tfx.interop.LikeError, match=r"Linear has no a\.weight"):
        trainer(tmp_path, other, [PruneCallback(params, spec, BATCH, budgets=BUDGETS, loss=loss)]).train()
