"""Positions as observations: every position of a sequence has gates of its own.

The truth is ordinary autograd by gates ``(T, units)`` that are multiplied in where the network reads, one example at a
time. Which axis has the positions is seen from the activations: no other one has their number.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import taylorfx as tfx
from taylorfx import Input, Node, Spec, residual, serial, store
from taylorfx import layers as L
from taylorfx.network.run import evaluate
from taylorfx.scoring.positions import position_axes
from taylorfx.testing.strategies import Network, network

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
T = 7
"""How many positions the examples have; no other axis is as long."""


def loss(outputs: Any, targets: Any) -> Tensor:
    return (outputs["logits"] if isinstance(outputs, dict) else outputs).sin().sum()


def truth(params: tfx.Params, spec: Spec, coupling: tfx.Coupling, one: Any, count: int = T) -> Tensor:
    """``(T, units)``: of one example, the derivatives of its loss by gates of every position."""
    values = torch.ones(count, len(coupling), dtype=torch.float64, requires_grad=True)
    extended = torch.cat([values, torch.ones(count, 1, dtype=torch.float64)], 1)

    def tap(name: str, slot: int, x: Tensor) -> Tensor:
        for place in (place for place in coupling.reads if (place.node, place.slot) == (name, slot)):
            (axis,) = (k for k, n in enumerate(x.shape) if n == count and k != place.axis)
            gate = torch.stack([extended[:, torch.from_numpy(row)] for row in place.units]).prod(0)
            gate = gate if axis < place.axis else gate.T
            sizes = [1] * x.ndim
            sizes[axis], sizes[place.axis] = count, place.units.shape[1]
            x = x * gate.reshape(sizes)
        return x

    outputs, _ = evaluate(params, spec, (one,), tap=tap)
    return torch.autograd.grad(loss(outputs, None), values)[0]


def check(net: Network, axis: str = "input.1", close: Mapping[str, float] = CLOSE, **options: Any) -> None:
    """Rows by position are the truth, and those of an example add up to its own."""
    arguments = net.params, net.spec, net.batch, net.coupling
    inputs, (count, length) = net.batch[0], net.batch[0][axis[:-2]].shape[:2]
    by_position = tfx.measure(*arguments, loss=loss, rows=True, per_position=axis, **options)
    examples = [{name: x[k : k + 1] for name, x in inputs.items()} for k in range(count)]
    each = [truth(net.params, net.spec, net.coupling, one, length) for one in examples]
    assert_close(by_position.rows, torch.cat(each), **close)
    by_example = tfx.measure(*arguments, loss=loss, rows=True, **options)
    assert (by_position.n, by_example.n) == (count * length, count)
    assert_close(by_position.rows.unflatten(0, (count, length)).sum(1), by_example.rows, **close)
    assert_close(by_position.sum_sq, by_position.rows.square().sum(0), **close)
    assert_close(by_position.loss, by_example.loss, **close)


CONV = serial(
    L.Permute((0, 2, 1)), L.Conv1d(4, 6, 3, padding=1), L.GELU(), L.Conv1d(6, 4, 1), L.Permute((0, 2, 1)),
)  # fmt: skip
BLOCKS: dict[str, Spec | tfx.Layer] = {
    "linear": serial(L.Linear(4, 5), L.Linear(5, 4)),
    "mlp": residual(serial(L.LayerNorm(4), L.Linear(4, 3), L.GELU(), L.Linear(3, 4))),
    "root mean square": L.RMSNorm(4),
    "attention": residual(tfx.multihead_attention(4, 2, head_dim=3)),
    "grouped, causal": residual(tfx.multihead_attention(4, 2, num_kv_heads=1, head_dim=2, causal=True)),
    "convolution": residual(CONV),
    "relu": L.ReLU(),
}
"""Of ``(N, T, 4)``."""


def sequence(names: Sequence[str], *, branches: bool = False) -> Network:
    blocks = {f"block{k}": BLOCKS[name] for k, name in enumerate(names)}
    return network(serial(Input((T, 4)), up=L.Linear(4, 4), **blocks, head=L.Linear(4, 2)), branches=branches)


@given(st.lists(st.sampled_from([*BLOCKS]), max_size=3), st.booleans())
@example([*BLOCKS], False)
@example(["attention", "mlp", "convolution"], True)
def test_rows_of_positions_are_those_of_gates_at_every_position(names: list[str], branches: bool) -> None:
    check(sequence(names, branches=branches))


@pytest.mark.parametrize("options", [{"fold": False}, {"micro_batch": 1}, {"moments": True}], ids=str)
def test_rows_of_positions_are_the_same_however_they_are_measured(options: dict[str, Any]) -> None:
    check(sequence([*BLOCKS]), **options)


def test_positions_that_no_output_depends_on_have_rows_of_zeros() -> None:
    """Scoring leaves out what is not used, but for this."""
    net = network(serial(Input((T, 4)), a=L.Linear(4, 5), gelu=L.GELU(), b=L.Linear(5, 2), first=L.Slice(1, 0, 2)))
    check(net)
    rows = tfx.measure(net.params, net.spec, net.batch, net.coupling, loss=loss, rows=True, per_position="input.1").rows
    assert rows is not None
    assert (rows.reshape(-1, T, 5) != 0).any(2).sum(1).tolist() == [2, 2, 2]


def test_positions_are_those_of_an_input_that_is_there() -> None:
    nodes = [Node("x", Input((T, 4))), Node("mask", Input((T, 4), calls=(True, False)))]
    nodes += [Node("product", L.Multiply(), ("x", "mask")), Node("either", L.Choose((0, 1)), ("product", "x"))]
    net = network(Spec((*nodes, Node("a", L.Linear(4, 5), "either"), Node("b", L.Linear(5, 2), "a"))))
    check(net, "mask.1")
    left_out = {"x": net.batch[0]["x"]}, net.batch[1]
    measured = tfx.measure(net.params, net.spec, left_out, net.coupling, loss=loss, per_position="x.1")
    assert measured.n == 3 * T
    with pytest.raises(ValueError, match=r"Positions are those of mask\.1; received a batch without mask, which has x"):
        tfx.measure(net.params, net.spec, left_out, net.coupling, loss=loss, per_position="mask.1")


def test_positions_are_not_mistaken_for_another_axis_of_the_same_length() -> None:
    net = network(serial(Input((T, T, 4)), a=L.Linear(4, 5), b=L.Linear(5, 2)))
    for axis in (1, 2):
        assert {*position_axes(net.spec, net.coupling.reads, f"input.{axis}").values()} == {axis}


class Captured(nn.Module):
    """Tokens as one axis with the examples, and a table of positions that is computed without any example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.flat, self.table, self.head = (
            nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)),
            nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Linear(4, 3),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        count, length, width = x.shape
        x = x + self.flat(x.reshape(count * length, width)).reshape(count, length, width)
        places = torch.arange(length, device=x.device).to(x.dtype)[:, None]
        return self.head(x + self.table(places))


def captured() -> tuple[tfx.Params, Spec]:
    torch.manual_seed(0)
    return tfx.from_torch(Captured().double().eval(), torch.randint(9, (3, T)))


def test_a_captured_network_has_rows_of_positions_at_every_length() -> None:
    params, spec = captured()
    coupling = tfx.couple(params, spec)
    assert any(place.example is None for place in coupling.reads), "the table is the same for all examples"
    assert any(place.shape[0] == T for place in coupling.reads if place.example), "positions are next to the examples"
    for length in (T, 11):
        batch = {"tokens": torch.randint(9, (2, length))}
        check(Network(spec, params, (batch, torch.zeros(2)), coupling), "tokens.1")
    batches = [(torch.randint(9, (2, length)), torch.zeros(2)) for length in (T, 8, 1)]
    stats = tfx.measure(params, spec, batches, coupling, loss=loss, rows=True, per_position="tokens.1")
    assert stats.n == len(stats.rows) == 2 * (T + 8 + 1)


def llama() -> tuple[Any, tfx.Params, Spec, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("torchvision"):
        from _torchvision import library

        library()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    mask = torch.ones(3, T, dtype=torch.int64)
    mask[1, :3] = 0  # padded on the left
    mask[2, 5:] = 0  # and on the right
    inputs = {"input_ids": torch.randint(30, (3, T)), "attention_mask": mask}
    return *tfx.interop.huggingface.from_pretrained(model, inputs, outputs="logits"), inputs


def test_rows_of_a_llama_are_those_of_its_tokens_and_padding_has_rows_of_zeros() -> None:
    _, params, spec, inputs = llama()
    coupling = tfx.couple(params, spec)
    single = {"rtol": 1e-4, "atol": 1e-6}  # in which its norms compute
    check(Network(spec, params, (inputs, torch.zeros(3)), coupling), "input_ids.1", single)
    labels = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], -100)
    stats = tfx.measure(
        params, spec, (inputs, labels), coupling, loss=tfx.interop.huggingface.next_token, rows=True,
        per_position="input_ids.1",
    )  # fmt: skip
    silent = (stats.rows == 0).all(1).reshape(3, T)
    # The last token of each foretells nothing; the padding before the first token of the second foretells that token.
    assert [row.nonzero().flatten().tolist() for row in silent] == [[6], [0, 1, 6], [4, 5, 6]]


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in optree.tree_leaves(result) if isinstance(x, Tensor)]
        self.numbers = max([self.numbers, *(x.untyped_storage().size() // x.element_size() for x in tensors)])
        return result


def test_rows_of_positions_are_made_without_a_tensor_of_scores() -> None:
    _, params, spec, _ = llama()
    coupling, length = tfx.couple(params, spec), 512
    inputs = {"input_ids": torch.randint(30, (1, length)), "attention_mask": torch.ones(1, length, dtype=torch.int64)}
    sizes = []
    for fold in (True, False):
        with Largest() as largest:
            tfx.derivatives(
                params, spec, inputs, torch.zeros(1), coupling, loss=loss, per_position="input_ids.1", fold=fold
            )
        sizes.append(largest.numbers)
    heads, columns = 2, sum(place.units.size for place in coupling.reads)
    assert sizes[0] == length * columns < heads * length * length <= sizes[1]


def squared() -> Spec:
    """Products of all pairs of positions, which a linear layer reads."""
    pairs = L.Einsum("bqd,bkd->bqkd")
    nodes = Node("x", Input((T, 4))), Node("up", L.Linear(4, 6), "x"), Node("pairs", pairs, ("up", "up"))
    return Spec((*nodes, Node("mix", L.Linear(6, 2), "pairs")))


REFUSED: dict[str, tuple[Spec, str, str]] = {
    "a pooled head": (
        serial(Input((T, 4)), up=L.Linear(4, 5), mean=L.Reduce("mean", (1,)), a=L.Linear(5, 3), b=L.Linear(3, 2)),
        "input.1", r"a \(Linear\), input 0 of shape \(1, 5\): none\n  b \(Linear\), input 0 of shape \(1, 3\): none\n",
    ),
    "images": (CONSTRUCTS["chain"], "input.1", r"takes no other size of it than 2"),
    "a fixed length": (CONSTRUCTS["multi-head"], "tokens.1", r"takes no other size of it than 3"),
    "a recurrent state": (
        serial(Input((T, 4)), lstm=L.LSTM(4, 3), head=L.Linear(3, 2)), "input.1", r"lstm \(LSTM\), state of shape"
    ),
    "a square of positions": (squared(), "x.1", r"mix \(Linear\), input 0 of shape \(1, 7, 7, 6\): 2\n"),
    "no such axis": (serial(Input((T, 4)), L.Linear(4, 2)), "x.1", r"has input.1, input.2, received 'x.1'"),
    "the examples": (serial(Input((T, 4)), L.Linear(4, 2)), "input.0", r"has input.1, input.2, received 'input.0'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_reads_without_positions_are_refused_and_all_are_named(name: str) -> None:
    spec, axis, message = REFUSED[name]
    net = network(spec)
    with pytest.raises(ValueError, match=message):
        tfx.measure(net.params, net.spec, net.batch, net.coupling, loss=loss, per_position=axis)


@pytest.mark.parametrize("options", [{"per_example": False}, {"per_position": "input"}, {"per_position": 1}], ids=str)
def test_positions_are_those_of_an_axis_and_of_examples(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'input_ids\.1', of examples with a loss of each; received"):
        tfx.Measurement(**{"per_position": "input.1", **options})


@pytest.mark.parametrize("options", [{"at_writes": True}, {"training": True}, {"at_writes": True, "training": True}])
def test_derivatives_of_positions_add_up_in_training_and_where_activations_are_made(options: dict[str, Any]) -> None:
    net = sequence(["mlp", "attention", "convolution"])
    arguments = net.params, net.spec, *net.batch, net.coupling
    one = tfx.derivatives(*arguments, loss=loss, per_position="input.1", **options)
    other = tfx.derivatives(*arguments, loss=loss, **options)
    assert_close(one.summed.unflatten(0, (-1, T)).sum(1), other.summed, **CLOSE)
    assert_close(one.losses, other.losses, **CLOSE)


def test_a_mean_over_the_positions_of_a_read_is_of_those_that_an_observation_has() -> None:
    """A sequence of pairs: at every position a layer reads two vectors."""
    net = network(serial(Input((T, 2, 4)), a=L.Linear(4, 5), gelu=L.GELU(), b=L.Linear(5, 2)))
    found = tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, loss=loss, per_position="input.1")
    assert_close(found.mean, found.summed / 2, **CLOSE)


def by_position(net: Network, **options: Any) -> tfx.Statistics:
    arguments = net.params, net.spec, net.batch, net.coupling
    return tfx.measure(*arguments, loss=loss, per_position="input.1", **options)


def test_criteria_and_choices_are_of_the_observations() -> None:
    net = sequence(["mlp", "attention"])
    stats = by_position(net, rows=True)
    assert stats.rows is not None
    fisher, mean = stats.rows.square().mean(0) / 2, stats.rows.mean(0)
    assert_close(tfx.fisher(stats, net.coupling), fisher, **CLOSE)
    assert_close(tfx.criteria.second_order(stats, net.coupling), fisher - mean, **CLOSE)
    assert_close(tfx.taylor(stats, net.coupling), stats.rows.abs().mean(0), **CLOSE)
    plan = tfx.joint(stats, net.coupling, budget=tfx.Units(0.7))
    gone = stats.rows[:, torch.from_numpy(~plan.keep)].sum(1)
    assert_close(tfx.expected_change(stats, plan), gone.square().mean() / 2 - gone.mean(), **CLOSE)
    by_example = tfx.measure(net.params, net.spec, net.batch, net.coupling, loss=loss, rows=True)
    assert by_example.rows is not None
    assert not torch.allclose(tfx.fisher(by_example, net.coupling), T * fisher), "positions of an example correlate"


def test_prune_chooses_by_rows_of_positions() -> None:
    net = sequence(["mlp", "attention"])
    options = {"budget": tfx.Flops(0.6), "loss": loss, "steps": 1}
    _, spec = tfx.prune(net.params, net.spec, net.batch, per_position="input.1", **options)
    plan = tfx.joint(by_position(net, rows=True), net.coupling, budget=tfx.Flops(0.6), cautious=True)
    assert spec == plan.spec
    repaired = tfx.prune(
        net.params, net.spec, net.batch, per_position="input.1", repair=tfx.reconstruct, **options
    ).plan
    assert (repaired.keep == plan.keep).all(), "the products of a repair know no positions"


def test_a_criterion_that_sums_up_itself_is_refused() -> None:
    net = sequence(["mlp"])
    with pytest.raises(
        ValueError, match="sums up itself is of examples; received per_position= with exact_second_order"
    ):
        tfx.prune(
            net.params, net.spec, net.batch, budget=0.8, loss=loss, per_position="input.1",
            criterion=tfx.truth.exact_second_order,
        )  # fmt: skip


def test_statistics_of_positions_add_up_with_their_like_alone_and_are_saved(tmp_path: Path) -> None:
    net = sequence(["mlp"])
    stats = by_position(net, rows=True)
    assert repr(stats + stats).startswith(f"Statistics({6 * T} positions in 2 batches, ")
    by_example = tfx.measure(net.params, net.spec, net.batch, net.coupling, loss=loss, rows=True)
    with pytest.raises(ValueError, match=r"with rows by position of input\.1 and .* with rows\. Measure both"):
        stats + by_example
    assert stats + tfx.Statistics.neutral(net.coupling.names) is stats
    store.save_statistics(tmp_path / "stats.safetensors", stats)
    loaded = store.load_statistics(tmp_path / "stats.safetensors", net.coupling)
    assert loaded.per_position == "input.1"
    assert_close((loaded + stats).rows, torch.cat([stats.rows, stats.rows]), **CLOSE)


def test_processes_measure_the_same_positions() -> None:
    assert tfx.Measurement(per_position="input.1").told() == "cross_entropy by position of input.1"
