"""The Trainer of transformers, which goes on with a smaller model: one Trainer for every size."""

import importlib.util

import pytest
import torch
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.interop import carry, huggingface, reschedule

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

import transformers

TEXTS = torch.randint(60, (16, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text} for text in TEXTS]


def trainer(folder, model, optimizers=(None, None)):
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, lr_scheduler_type="constant_with_warmup",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=DATA, optimizers=optimizers)


def test_a_trainer_goes_on_with_a_smaller_model_and_the_optimizer_of_the_one_before(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    first = trainer(tmp_path / "first", model)
    first.train()
    model, params, spec = huggingface.from_pretrained(model.eval(), outputs="logits")
    coupling = tfx.couple(params, spec)
    stats = tfx.measure(params, spec, ({"input_ids": TEXTS, "attention_mask": torch.ones_like(TEXTS)}, TEXTS), coupling,
                        loss=huggingface.next_token)  # fmt: skip
    held = huggingface.holdable(model, params, spec)
    plan = tfx.select(tfx.taylor(stats, coupling), coupling, budget=tfx.Parameters(0.8), constraints=held)
    huggingface.save_pretrained(tmp_path / "smaller", tfx.cut(params, plan), plan.spec, like=model)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    optimizer = carry(first.optimizer, plan, small, old=model)
    assert type(optimizer) is torch.optim.AdamW
    assert small.config.intermediate_size < 24
    whole, smaller = ({name: made.state[p] for name, p in one.named_parameters() if p in made.state}
                      for one, made in ((model, first.optimizer.optimizer), (small, optimizer)))  # fmt: skip
    moments = {name: state["exp_avg"] for name, state in whole.items()}
    flat = tfx.tree.flatten(tfx.cut(tfx.tree.unflatten(moments), plan))
    assert flat.keys() == smaller.keys()
    assert_close(flat, {name: state["exp_avg"] for name, state in smaller.items()})
    scheduler = reschedule(first.lr_scheduler, optimizer)
    second = trainer(tmp_path / "second", small, (optimizer, scheduler))
    cut = {name: p.detach().clone() for name, p in small.named_parameters()}
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}
    second.train()
    assert {int(state["step"]) for state in optimizer.state.values()} == {16}, "in one row"
    assert not torch.equal(small.model.layers[0].mlp.up_proj.weight, cut["model.layers.0.mlp.up_proj.weight"])
    second.save_model(tmp_path / "last")
    last = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last").eval()
    assert_close(last(TEXTS).logits, small.eval()(TEXTS).logits)
