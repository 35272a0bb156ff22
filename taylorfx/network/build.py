"""Building networks from parts: `serial`, `residual`, `concat`, `inline`, `multihead_attention`.

A part is a layer or another network. Networks compose by value: a part's nodes are copied under the name that the part
gets, as torch names the children of a module.
"""

from __future__ import annotations

from collections.abc import Container

from taylorfx.layers import Add, Attention, Concat, Input, Layer, Linear
from taylorfx.network.spec import Node, Spec, SpecError

__all__ = ["concat", "inline", "multihead_attention", "residual", "serial", "unused"]

Part = Layer | Spec

INPUT = "input"


def inline(part: Part, name: str, inputs: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes of a part, named under ``name`` and fed from ``inputs``; the last one gives its value out.

    This is how a network becomes a piece of a larger one that is written node by node.

    Raises:
        SpecError: if the part does not take that many inputs or has several outputs.
    """
    if isinstance(part, Layer):
        return (Node(name, part, inputs),)
    if not isinstance(part, Spec):
        raise SpecError(f"A part is a layer or a network, ReLU() and not ReLU; received {part!r} for {name!r}.")
    if len(part.inputs) != len(inputs) or len(part.outputs) != 1:
        raise SpecError(
            f"A part {name!r} has one output and takes the {len(inputs)} inputs that it is given; "
            f"received one with {len(part.inputs)} inputs and {len(part.outputs)} outputs."
        )
    heard = dict(zip((node.name for node in part.inputs), inputs, strict=True))

    def under(path: str) -> str:
        return f"{name}.{path}" if name else path

    nodes: list[Node] = []
    for node in part.nodes:
        if isinstance(node.layer, Input):
            continue
        params = node.params
        if isinstance(params, str):
            params = under(params)
        elif isinstance(params, tuple):
            params = tuple((leaf, under(path)) for leaf, path in params)
        heard[node.name] = under(node.name)
        nodes.append(Node(under(node.name), node.layer, tuple(heard[x] for x in node.inputs), params))
    last = heard[part.outputs[0]]
    nodes.sort(key=lambda node: node.name == last)
    return tuple(nodes)


def serial(*parts: Part, **named: Part) -> Spec:
    """One part after the other, named ``0``, ``1``, ... as in ``torch.nn.Sequential``, or by keyword.

    Begin with an `Input` to declare the shape of an example; it counts as no part. Without any part it is the identity.

    >>> from taylorfx import layers as L
    >>> spec = serial(L.Input((1, 8, 8)), conv=L.Conv2d(1, 4, 3), flat=L.Flatten(), fc=L.Linear(144, 10))
    >>> [node.name for node in spec]
    ['input', 'conv', 'flat', 'fc']
    """
    first = Node(INPUT, Input())
    if parts and isinstance(parts[0], Input):
        first, parts = Node(INPUT, parts[0]), parts[1:]
    nodes, current = [first], INPUT
    numbered = {str(k): part for k, part in enumerate(parts)}
    twice = numbered.keys() & named.keys()
    if twice:
        raise SpecError(f"Parts are numbered or named; received the name {min(twice)!r}, which is a number taken.")
    for name, part in {**numbered, **named}.items():
        added = inline(part, name, (current,))
        nodes += added
        current = added[-1].name if added else current
    return Spec(tuple(nodes), (current,))


def residual(body: Part, shortcut: Part | None = None) -> Spec:
    """``body(x) + x``, or ``body(x) + shortcut(x)``; the channels of both are tied.

    The body's nodes keep their names, the shortcut's lie under ``shortcut``, the sum is ``add``.
    """
    inner = serial(body) if isinstance(body, Layer) else body
    nodes = [Node(INPUT, Input()), *inline(inner, "", (INPUT,))]
    last = nodes[-1].name
    side = INPUT
    if shortcut is not None:
        nodes += inline(shortcut, "shortcut", (INPUT,))
        side = nodes[-1].name
    return Spec((*nodes, Node("add", Add(), (last, side))), ("add",))


def concat(*branches: Part, dim: int = 1) -> Spec:
    """All branches applied to the same input, their outputs joined along ``dim``; ``serial()`` is the input itself.

    Branches are named ``0``, ``1``, ...; the joint is ``concat``.
    """
    nodes, ends = [Node(INPUT, Input())], []
    for k, branch in enumerate(branches):
        added = inline(branch, str(k), (INPUT,))
        nodes += added
        ends.append(added[-1].name if added else INPUT)
    return Spec((*nodes, Node("concat", Concat(dim), tuple(ends))), ("concat",))


def multihead_attention(
    embed_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    kdim: int | None = None,
    vdim: int | None = None,
    bias: bool = True,
    causal: bool = False,
    cross: bool = False,
    mask: bool = False,
) -> Spec:
    """``torch.nn.MultiheadAttention`` (``batch_first``) with separate projections, as one part.

    Nodes ``q_proj``, ``k_proj``, ``v_proj``, ``attention``, ``out_proj``. Self-attention takes one input
    ``(N, T, embed_dim)``; with ``cross`` it takes query, key and value (of ``kdim`` and ``vdim`` features); with
    ``mask`` a mask after these, as `Attention` takes it. ``num_kv_heads`` below ``num_heads`` groups the queries.
    The projections start as torch's ``Linear``, not as its packed attention.
    """
    width, kv_heads = head_dim or embed_dim // num_heads, num_kv_heads or num_heads
    if head_dim is None and embed_dim % num_heads:
        raise SpecError(f"The heads divide embed_dim; received embed_dim={embed_dim}, num_heads={num_heads}.")
    names = ("query", "key", "value") if cross else ("query",)
    sources = dict(zip("qkv", names if cross else names * 3, strict=True))
    features = {"q": embed_dim, "k": kdim or embed_dim, "v": vdim or embed_dim}
    heads = {"q": num_heads, "k": kv_heads, "v": kv_heads}
    nodes = [Node(name, Input()) for name in (*names, *(("mask",) if mask else ()))]
    for x, source in sources.items():
        nodes.append(Node(f"{x}_proj", Linear(features[x], heads[x] * width, bias), (source,)))
    heard = ("q_proj", "k_proj", "v_proj", *(("mask",) if mask else ()))
    nodes.append(Node("attention", Attention(num_heads, width, kv_heads, causal=causal), heard))
    nodes.append(Node("out_proj", Linear(num_heads * width, embed_dim, bias), ("attention",)))
    return Spec(tuple(nodes), ("out_proj",))


def unused(name: str, taken: Container[str]) -> str:
    """The name, or one much like it that nobody has."""
    return unused(f"{name}_", taken) if name in taken else name
