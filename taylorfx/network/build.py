"""Build networks from parts: `serial`, `residual`, `concat`, `inline`, `multihead_attention`.

A part is a layer or another network. Building copies the nodes of a part, and puts the name of the part before theirs,
as torch does with the children of a module: node ``conv`` of part ``block`` becomes ``block.conv``.
"""

from __future__ import annotations

from collections.abc import Container

from taylorfx.layers import Add, Attention, Concat, Input, Layer, Linear
from taylorfx.network.spec import Node, Spec, SpecError

__all__ = ["concat", "inline", "multihead_attention", "residual", "serial", "unused"]

Part = Layer | Spec

INPUT = "input"


def inline(part: Part, name: str, inputs: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes of a part, with ``name`` before their names. The last of them computes the part's output.

    Use it for a part of a network that is otherwise written node by node.

    >>> from taylorfx import layers as L
    >>> [f"{node.name} of {node.inputs}" for node in inline(serial(L.ReLU(), L.Tanh()), "act", ("x",))]
    ["act.0 of ('x',)", "act.1 of ('act.0',)"]

    Args:
        inputs: the nodes that the part's inputs are, in their order.

    Raises:
        SpecError: if the part has another number of inputs, or several outputs.
    """
    if isinstance(part, Layer):
        return (Node(name, part, inputs),)
    if not isinstance(part, Spec):
        raise SpecError(f"A part is a layer or a network, ReLU() and not ReLU; received {part!r} for {name!r}.")
    if part.calls:
        raise SpecError(
            f"A part has inputs that are always there; some of {name!r} may be left out. Take the network of one call, "
            "spec.called(...)."
        )
    if len(part.inputs) != len(inputs) or len(part.outputs) != 1:
        raise SpecError(
            f"Here the part {name!r} needs {len(inputs)} inputs and one output; "
            f"received a network with {len(part.inputs)} inputs and {len(part.outputs)} outputs."
        )
    names = dict(zip((node.name for node in part.inputs), inputs, strict=True))  # old name to new

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
        names[node.name] = under(node.name)
        nodes.append(Node(under(node.name), node.layer, tuple(names[x] for x in node.inputs), params))
    last = names[part.outputs[0]]
    nodes.sort(key=lambda node: node.name == last)
    return tuple(nodes)


def serial(*parts: Part, **named: Part) -> Spec:
    """The parts one after the other, named ``0``, ``1``, ... as in ``torch.nn.Sequential``, or by keyword.

    An `Input` at the beginning declares the shape of an example; it gets no number. Without parts this is the identity.

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
        raise SpecError(
            f"Each part has a name of its own; received the name {min(twice)!r} for the part of that number."
        )
    for name, part in {**numbered, **named}.items():
        added = inline(part, name, (current,))
        nodes += added
        current = added[-1].name if added else current
    return Spec(tuple(nodes), (current,))


def residual(body: Part, shortcut: Part | None = None) -> Spec:
    """``body(x) + x``, or ``body(x) + shortcut(x)``. The channels of both operands are tied: they leave together.

    The nodes of the body keep their names, those of the shortcut begin with ``shortcut.``, and the sum is ``add``.

    >>> from taylorfx import layers as L
    >>> [node.name for node in residual(serial(conv=L.Conv2d(4, 4, 1)), shortcut=L.Conv2d(4, 4, 1))]
    ['input', 'conv', 'shortcut', 'add']
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
    """All branches applied to the same input, and their outputs concatenated along ``dim``.

    The branches are named ``0``, ``1``, ..., and the last node ``concat``. The branch ``serial()`` is the input itself.

    >>> from taylorfx import layers as L
    >>> spec = serial(L.Input((4, 8, 8)), dense=concat(serial(), L.Conv2d(4, 6, 1)))
    >>> [node.name for node in spec]
    ['input', 'dense.1', 'dense.concat']
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

    Its nodes are ``q_proj``, ``k_proj``, ``v_proj``, ``attention`` and ``out_proj``. The projections are initialized as
    torch's ``Linear``, not as its packed attention.

    Args:
        num_kv_heads: fewer heads for keys and values than for queries (grouped-query attention).
        head_dim: features of a head; by default ``embed_dim / num_heads``.
        kdim, vdim: features of key and value, with ``cross``; by default ``embed_dim``.
        causal: no query attends to a later position.
        cross: three inputs, query, key and value, instead of a single ``(N, T, embed_dim)``.
        mask: one more input, the mask as `Attention` takes it.

    Raises:
        SpecError: if the heads do not divide ``embed_dim`` and no ``head_dim`` is given.
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
    operands = ("q_proj", "k_proj", "v_proj", *(("mask",) if mask else ()))
    nodes.append(Node("attention", Attention(num_heads, width, kv_heads, causal=causal), operands))
    nodes.append(Node("out_proj", Linear(num_heads * width, embed_dim, bias), ("attention",)))
    return Spec(tuple(nodes), ("out_proj",))


def unused(name: str, taken: Container[str]) -> str:
    """The name; if it is taken, the name with underscores that is not.

    >>> unused("fc", {"fc", "fc_"})
    'fc__'
    """
    return unused(f"{name}_", taken) if name in taken else name
