"""What a user can add, added from outside the package: a layer, a criterion, an operator's rule, a budget, and more."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import outside
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing import check_layer

Network = tuple[tfx.Params, tfx.Spec]
Batch = tuple[Tensor, Tensor]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (24,), generator=generator)


@pytest.fixture
def network() -> Network:
    spec = tfx.serial(tfx.Input((6,)), a=outside.GatedLinear(6, 9), b=outside.GatedLinear(9, 7), head=L.Linear(7, 3))
    leaves = tfx.tree.flatten(tfx.init(spec, torch.Generator().manual_seed(1)))
    return tfx.tree.unflatten({path: leaf.double() for path, leaf in leaves.items()}), spec


def widths(spec: tfx.Spec) -> list[int]:
    return [node.layer.out_features for node in spec if isinstance(node.layer, (outside.GatedLinear, L.Linear))]


def public_names(tree: ast.AST) -> Iterator[str]:
    """What a module takes from taylorfx, as attributes of the package: ``prune``, ``cost.parameters``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (text := re.fullmatch(r"tfx\.([\w.]+)", ast.unparse(node))):
            yield text[1]


def test_the_users_module_needs_public_names_only() -> None:
    tree = ast.parse(Path(inspect.getsourcefile(outside) or "").read_text())
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [line for line in imports if "taylorfx" in line] == ["import taylorfx as tfx"]
    names = set(public_names(tree))
    assert len(names) > 10
    for name in names:
        first, _, inner = name.partition(".")
        assert first in tfx.__all__, name
        namespace = getattr(tfx, first)
        assert not (inspect.ismodule(namespace) and inner) or inner in namespace.__all__, name


def test_a_layer(network: Network, batch: Batch, tmp_path: Path) -> None:
    """It computes what torch does, its rules are proven, and it is pruned, written and read with its class."""
    layer, x = outside.GatedLinear(6, 9), batch[0]
    leaves = {name: leaf.double() for name, leaf in layer.init(torch.Generator().manual_seed(0)).items()}
    assert_close(layer.apply(leaves, x), F.glu(x @ torch.cat([leaves["value"], leaves["gate"]]).T))
    coupling = check_layer(layer, (2, 6))
    assert dict(zip(coupling.scopes, coupling.sizes.tolist(), strict=True))["layer"] == 9
    assert tfx.cost.flops(tfx.couple(*network)).total == 2 * (2 * 6 * 9 + 2 * 9 * 7 + 7 * 3)

    params, spec = tfx.prune(*network, batch, budget=tfx.Flops(0.5))
    assert widths(spec) < widths(network[1])
    tfx.save(tmp_path / "small.safetensors", params, spec)
    read = tfx.load(tmp_path / "small.safetensors")
    assert read[1] == spec
    assert type(read[1]["a"].layer) is outside.GatedLinear
    assert torch.equal(tfx.apply(*read, x), tfx.apply(params, spec, x))


def test_a_criterion(network: Network, batch: Batch) -> None:
    """What stays are the units of the highest scores, as numpy computes them from every example's derivatives."""
    coupling = tfx.couple(*network)
    rows = abs(tfx.derivatives(*network, *batch, coupling)[1].numpy())
    scores = rows.mean(0) + 2 * rows.std(0) / np.sqrt(len(rows))
    stats = tfx.measure(*network, batch, coupling)
    assert_close(outside.optimistic(stats, coupling), torch.from_numpy(scores), rtol=1e-5, atol=1e-7)

    pruned = tfx.prune(*network, batch, budget=tfx.Units(10), criterion=outside.optimistic)
    plan = tfx.Plan(coupling, scores >= np.sort(scores)[-10])
    assert pruned[1] == plan.spec
    assert_close(tfx.apply(*pruned, batch[0]), tfx.apply(*network, batch[0], gates=plan.gates))


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(outside.bent_identity(self.a(x), 0.5))
        return result


def test_an_operators_rule(batch: Batch) -> None:
    """The captured network computes what the module does, and the units that the operator passes on can leave."""
    module, x = Bent().double().eval(), batch[0]
    params, spec = tfx.from_torch(module, x)
    assert outside.BentIdentity(0.5) in [node.layer for node in spec]
    assert_close(tfx.apply(params, spec, x), module(x).detach())
    assert len(tfx.couple(params, spec)) == 8

    small = tfx.to_torch(*tfx.prune(params, spec, batch, budget=tfx.Units(5)), like=module)
    assert type(small) is Bent
    assert small.a.out_features == 5


def test_a_budget(network: Network, batch: Batch) -> None:
    """It is met, and left unspent by less than one unit's weights."""
    params, _ = tfx.prune(*network, batch, budget=outside.Bytes(200))
    size = 2 * sum(leaf.numel() for leaf in tfx.tree.flatten(params).values())
    assert 200 - 2 * max(2 * 6 + 2 * 7, 2 * 9 + 3) < size <= 200
    with pytest.raises(tfx.BudgetError, match="bytes"):
        tfx.prune(*network, batch, budget=outside.Bytes(10))


def test_a_repair(network: Network, batch: Batch) -> None:
    """Through every step of `prune`, the outputs keep their mean; merely cut, they do not."""
    expected = tfx.apply(*network, batch[0]).mean(0)
    for repair, kept in ((None, False), (outside.shift_outputs, True)):
        pruned = tfx.prune(*network, batch, budget=tfx.Flops(0.4), repair=repair)
        assert torch.allclose(tfx.apply(*pruned, batch[0]).mean(0), expected, rtol=1e-9, atol=1e-9) == kept


def test_a_selection(network: Network, batch: Batch) -> None:
    """`prune` cuts what it chooses, and refuses what does not meet the budget."""
    coupling = tfx.couple(*network)
    scores = tfx.fisher(tfx.measure(*network, batch, coupling), coupling)
    asked = {"criterion": tfx.fisher, "choose": outside.best_half, "steps": 1}
    params, spec = tfx.prune(*network, batch, budget=tfx.Flops(0.7), **asked)
    assert widths(spec) == [5, 4, 3]
    plan = outside.best_half(scores, coupling, budget=(), constraints=tfx.Constraints(), per_cost=True)
    assert all(
        scores[plan.keep & (coupling.scope == k)].min() > scores[~plan.keep & (coupling.scope == k)].max()
        for k in (0, 1)
    )
    gated = tfx.apply(*network, batch[0], gates=plan.gates)
    assert_close(tfx.apply(params, spec, batch[0]), gated)
    assert not torch.allclose(gated, tfx.apply(*network, batch[0]))
    with pytest.raises(tfx.BudgetError, match="best_half does not meet"):
        tfx.prune(*network, batch, budget=tfx.Flops(0.1), **asked)
