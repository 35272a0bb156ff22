"""Left padding: queries that may attend nowhere, in captured modules, in their derivatives and in scoring."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import taylorfx as tfx


class Decoder(nn.Module):
    """One causal layer of attention with a mask of its own, fused or by hand; scores are those of the last token."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.kv = nn.Linear(4, 8), nn.Linear(4, 8)
        self.mlp, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = keep[:, None, None, :] & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        lowest = -torch.inf if self.kind == "infinite" else torch.finfo(x.dtype).min
        added = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)
        if self.kind == "grouped":
            y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            if self.kind == "by hand":
                y = (q @ k.transpose(-1, -2) * 0.5 + added).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, mask if self.kind == "boolean" else added)
        return self.head(self.mlp(y.transpose(1, 2).flatten(2)).relu()[:, -2:].mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["boolean", "infinite", "lowest", "grouped", "by hand"])
def test_padded_sequences_are_scored_as_the_module_says(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Decoder(kind).to(dtype).eval()
    x, targets = torch.randn(3, 6, 4, dtype=dtype), torch.tensor([0, 2, 1])
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[1, :2] = keep[2, :5] = False  # of the last, the second query from the end may attend nowhere
    params, spec = tfx.from_torch(module, (x, keep))
    assert_close(tfx.apply(params, spec, (x, keep)), module(x, keep))
    coupling = tfx.couple(params, spec)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    units = [k for k, name in enumerate(coupling.names) if name.startswith("mlp[")]
    assert len(units) == 5
    _, rows, *_ = tfx.derivatives(params, spec, (x, keep), targets, coupling)
    plain = tfx.derivatives(params, spec, (x, keep), targets, coupling, fold=False)[1]
    assert rows.isfinite().all()
    assert_close(rows, plain, **close)
    # What the module's own automatic differentiation says of the hidden features: activation times gradient.
    kept: dict[str, Tensor] = {}
    hook = module.mlp.register_forward_hook(lambda _, __, out: kept.setdefault("mlp", out.relu()))
    losses = F.cross_entropy(module(x, keep), targets, reduction="sum")
    hook.remove()
    pooled = kept["mlp"][:, -2:].mean(1)
    slopes = torch.autograd.grad(F.cross_entropy(module.head(pooled), targets, reduction="sum"), pooled)[0]
    assert losses.isfinite()
    assert_close(rows[:, units], (pooled * slopes).detach(), **close)
    alone = [
        tfx.derivatives(params, spec, (x[k : k + 1], keep[k : k + 1]), targets[k : k + 1], coupling)[1]
        for k in range(3)
    ]
    assert_close(torch.cat(alone), rows, **close)
