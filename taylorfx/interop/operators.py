"""From ATen operators to layers: one converter per operator, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from taylorfx import layers as L
from taylorfx.layers import Layer, Shape
from taylorfx.layers.tensor import COUNT, DTYPE, SLOT
from taylorfx.spec import Node

__all__ = ["CONVERTERS", "Convert", "Unmapped"]


class Unmapped(Exception):
    """This use of an operator has no rule; it stays as it was captured."""


class Convert:
    """The network so far: nodes, and where the graph's values are found among them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.names: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.paths: dict[str, tuple[str, bool]] = {}
        self.constants: dict[str, Tensor] = {}
        self.taken: set[str] = set()
        self.reference: str | None = None

    # What comes in.

    def user_input(self, node: fx.Node) -> None:
        shape, axis = measured(node)
        self.add(node, L.Input(shape[1:] if axis == 0 else shape), ())
        if axis == 0 and self.reference is None:
            self.reference = self.names[node.name]

    def parameter(self, node: fx.Node, tensor: Tensor, path: str, trained: bool | None = None) -> None:
        self.tensors[path] = tensor.detach()
        self.paths[node.name] = path, isinstance(tensor, torch.nn.Parameter) if trained is None else trained

    def constant(self, node: fx.Node, tensor: Tensor, name: str) -> None:
        self.constants[node.name] = tensor
        self.parameter(node, tensor, f"constants.{name.replace('.', '_')}", False)

    # Looking at arguments.

    def path(self, node: Any) -> str:
        """The path of an argument that is one of the module's own tensors."""
        if not isinstance(node, fx.Node) or node.name not in self.paths:
            raise Unmapped
        return self.paths[node.name][0]

    def tensor(self, node: fx.Node) -> str:
        """The name of the node that gives this value."""
        if node.name not in self.names:
            path, trained = self.paths[node.name]
            shape = tuple(self.tensors[path].shape)
            kind = L.Parameter if trained else L.Buffer
            if path not in self.taken:
                self.nodes.append(Node(path, kind(shape)))
                self.taken.add(path)
            self.names[node.name] = path
        return self.names[node.name]

    # Writing nodes.

    def add(
        self,
        node: fx.Node,
        layer: Layer,
        inputs: Sequence[str],
        *,
        leaves: Mapping[str, str] | None = None,
        tag: str = "",
    ) -> str:
        """Write the node of a graph's value; ``leaves`` says where its parameters lie."""
        leaves = leaves or {}
        home = {path.rpartition(".")[0] for path in leaves.values()}
        name = home.pop() if len(home) == 1 else ""
        if not name or name in self.taken or any(path.startswith(f"{name}.") for path in self.taken):
            name = f"{node.name}{tag}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        moved = tuple((leaf, path) for leaf, path in leaves.items() if path != f"{name}.{leaf}")
        self.nodes.append(Node(name, layer, tuple(inputs), moved or None))
        self.names[node.name] = name
        return name

    def alias(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.name in self.paths:
            self.paths[node.name] = self.paths[source.name]
        else:
            self.names[node.name] = self.tensor(source)

    def template(self, node: fx.Node) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...], list[str]]:
        """The arguments of an operator as a template, and the nodes that fill it."""
        inputs: list[str] = []
        counted = False

        def hold(value: Any) -> Any:
            nonlocal counted
            if isinstance(value, fx.Node):
                held = value.meta.get("val")
                if isinstance(held, Tensor):
                    inputs.append(self.tensor(value))
                    return (SLOT, len(inputs) - 1)
                value = held
            if isinstance(value, torch.SymInt):
                counted = True
                return (COUNT, _coefficient(value))
            if isinstance(value, (list, tuple)):
                return tuple(map(hold, value))
            if isinstance(value, torch.dtype):
                return (DTYPE, str(value).removeprefix("torch."))
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            raise Unmapped

        args = tuple(map(hold, node.args))
        dropped = ("device", "layout", "pin_memory", "memory_format")
        kwargs = tuple((key, hold(value)) for key, value in node.kwargs.items() if key not in dropped)
        if counted:
            if self.reference is None:
                raise Unmapped
            inputs.append(self.reference)
        return args, kwargs, inputs

    def operator(self, node: fx.Node, kind: Callable[..., Layer], item: int | None = None, **fields: Any) -> None:
        args, kwargs, inputs = self.template(node)
        name = str(node.target).removeprefix("aten.")
        self.add(node, kind(name, args, kwargs, item, **fields), inputs)

    def generic(self, node: fx.Node) -> None:
        """An operator without a converter: pointwise, constant, or as captured."""
        values = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if not values or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            raise Unmapped
        shapes = [measured(n)[0] for n in values]
        if measured(node)[0] != tuple(torch.broadcast_shapes(*shapes)):  # type: ignore[no-untyped-call]
            raise Unmapped
        return self.operator(node, L.Elementwise)

    def folded(self, node: fx.Node) -> bool:
        """Compute what depends on nothing but numbers once and for all: it becomes a constant."""
        target: Any = node.target
        name, value, constants = str(target), node.meta.get("val"), self.constants
        if name.startswith(("aten.new_zeros", "aten.new_ones", "aten.new_full")) and len(node.all_input_nodes) == 1:
            (source,) = node.all_input_nodes  # of which only the dtype counts
            constants = {source.name: torch.zeros((), dtype=source.meta["val"].dtype)}
        known = all(n.name in constants for n in node.all_input_nodes)
        if not known or not isinstance(value, Tensor) or name.startswith(("aten.rand", "aten.bernoulli")):
            return False
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: constants[n.name])
        self.constant(node, target(*args, **kwargs), node.name)
        return True

    def captured(self, node: fx.Node, item: int | None = None, source: fx.Node | None = None) -> None:
        if isinstance(node.meta["val"], (tuple, list)):
            return  # each of its results is captured by itself
        shape, axis = measured(node)
        source = source or node
        try:
            args, kwargs, inputs = self.template(source)
        except Unmapped:
            raise ValueError(f"{source.target} takes arguments that cannot be kept: {source.format_node()}") from None
        given = tuple(measured(n)[1] for n in _tensors(source)) + (0,) * (len(inputs) - len(_tensors(source)))
        layer = L.Captured(str(source.target).removeprefix("aten."), args, kwargs, item, shape, axis, given)
        self.add(node, layer, inputs)

    def getitem(self, node: fx.Node) -> None:
        """One of several results: a piece of a split axis, or the first of a norm's."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        name = str(source.target)
        if source.name in self.names:
            self.names[node.name] = self.names[source.name]
        elif name.startswith(("aten.split", "aten.chunk", "aten.unbind")):
            self._piece(node, source, index, name.startswith("aten.unbind"))
        else:
            self.captured(node, index, source)

    def _piece(self, node: fx.Node, source: fx.Node, index: int, unbind: bool) -> None:
        whole: Any = source.args[0]
        dim = _argument(source, 1 if unbind else 2, "dim", 0) % len(measured(whole)[0])
        widths = [1 if unbind else part.shape[dim] for part in source.meta["val"]]
        self.slice(node, whole, dim, sum(widths[:index]), sum(widths[: index + 1]), drop=unbind)

    def slice(self, node: fx.Node, x: fx.Node, dim: int, start: int, stop: int, *, drop: bool = False) -> None:
        shape, axis = measured(x)
        if axis == dim:
            raise Unmapped
        name = self.tensor(x)
        if (start, stop) != (0, shape[dim]):
            name = self.add(node, L.Slice(dim, start, stop), (name,), tag="_slice" if drop else "")
        if drop:
            made, new_axis = measured(node)
            name = self.add(node, L.View(made, axis, new_axis), (name,))
        self.names[node.name] = name


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors among an operator's arguments, in their order, as often as they stand there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), lambda n: found.append(n))
    return [n for n in found if isinstance(n.meta.get("val"), Tensor)]


def measured(node: fx.Node) -> tuple[Shape, int]:
    """The shape of a value for one example, and the axis along which examples run (-1: none)."""
    value: Any = node.meta["val"]
    if not isinstance(value, Tensor):
        raise Unmapped
    axis = -1
    for k, n in enumerate(value.shape):
        if isinstance(n, torch.SymInt):
            if axis >= 0:
                raise Unmapped
            axis = k
    return tuple(_coefficient(n) if isinstance(n, torch.SymInt) else n for n in value.shape), axis


def _coefficient(size: torch.SymInt) -> int:
    """How many positions a size has for one example: 4 of ``4 * s0``."""
    expression = size.node.expr
    symbols = expression.free_symbols
    if len(symbols) != 1:
        raise Unmapped
    (symbol,) = symbols
    factor = expression.subs(symbol, 1)
    if expression != factor * symbol:
        raise Unmapped
    return int(factor)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An operator's argument, by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _node(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise Unmapped
    return value


def _convolution(c: Convert, node: fx.Node) -> None:
    x, weight = _node(node.args[0]), c.path(node.args[1])
    bias = _argument(node, 2, "bias")
    shape = tuple(c.tensors[weight].shape)
    leaves = {"weight": weight} if bias is None else {"weight": weight, "bias": c.path(bias)}
    rank = len(shape) - 2
    transposed = "transpose" in str(node.target)
    stride, padding = _argument(node, 3, "stride", 1), _argument(node, 4, "padding", 0)

    def each(value: Any) -> Any:
        return value if isinstance(value, (int, str)) else tuple(value) * (rank if len(value) == 1 else 1)

    if transposed:
        kind: Any = {1: L.ConvTranspose1d, 2: L.ConvTranspose2d}.get(rank)
        extra, groups = _argument(node, 5, "output_padding", 0), _argument(node, 6, "groups", 1)
        dilation = _argument(node, 7, "dilation", 1)
        if kind is None:
            raise Unmapped
        layer: Layer = kind(
            shape[0], shape[1] * groups, shape[2:], stride=each(stride), padding=each(padding), dilation=each(dilation),
            groups=groups, bias=bias is not None, output_padding=each(extra),
        )  # fmt: skip
    else:
        dilation, groups = _argument(node, 5, "dilation", 1), _argument(node, 6, "groups", 1)
        forward = {1: L.Conv1d, 2: L.Conv2d, 3: L.Conv3d}[rank]
        layer = forward(shape[1] * groups, shape[0], shape[2:], each(stride), each(padding), each(dilation), groups,
                        bias is not None)  # fmt: skip
    if len(measured(x)[0]) != rank + 2:
        raise Unmapped
    c.add(node, layer, (c.tensor(x),), leaves=leaves)


def _linear(c: Convert, node: fx.Node) -> None:
    x, weight, bias = _node(node.args[0]), _node(node.args[1]), _argument(node, 2, "bias")
    if weight.name in c.paths and (bias is None or _node(bias).name in c.paths):
        path = c.path(weight)
        shape = tuple(c.tensors[path].shape)
        leaves = {"weight": path} if bias is None else {"weight": path, "bias": c.path(bias)}
        c.add(node, L.Linear(shape[1], shape[0], bias is not None), (c.tensor(x),), leaves=leaves)
        return
    turned = c.add(node, L.Permute((1, 0)), (c.tensor(weight),), tag="_t")
    product = c.add(node, L.MatMul(), (c.tensor(x), turned), tag="_product" if bias is not None else "")
    if bias is not None:
        c.add(node, L.Add(), (product, c.tensor(_node(bias))))


def _batch_norm(c: Convert, node: fx.Node) -> None:
    arguments: Any = node.args[:7]
    x, weight, bias, mean, var, momentum, eps = arguments
    rank = len(measured(_node(x))[0])
    kind = {2: L.BatchNorm1d, 3: L.BatchNorm1d, 4: L.BatchNorm2d, 5: L.BatchNorm3d}.get(rank)
    if kind is None or (weight is None) != (bias is None):
        raise Unmapped
    leaves = {} if weight is None else {"weight": c.path(weight), "bias": c.path(bias)}
    leaves |= {"running_mean": c.path(mean), "running_var": c.path(var)}
    home = leaves["running_mean"].rpartition(".")[0]
    leaves["num_batches_tracked"] = f"{home}.num_batches_tracked" if home else "num_batches_tracked"
    c.tensors.setdefault(leaves["num_batches_tracked"], torch.zeros((), dtype=torch.long))
    features = len(c.tensors[leaves["running_mean"]])
    c.add(node, kind(features, eps, momentum, weight is not None), (c.tensor(_node(x)),), leaves=leaves)


def _layer_norm(c: Convert, node: fx.Node) -> None:
    x, shape, weight, bias = (
        _argument(node, k, name) for k, name in enumerate(("input", "normalized_shape", "weight", "bias"))
    )
    if weight is None and bias is not None:
        raise Unmapped
    leaves = {name: c.path(value) for name, value in (("weight", weight), ("bias", bias)) if value is not None}
    eps, affine = _argument(node, 4, "eps", 1e-5), weight is not None
    layer = L.LayerNorm(tuple(shape), eps, affine, bias is not None or not affine)
    c.add(node, layer, (c.tensor(_node(x)),), leaves=leaves)


def _rms_norm(c: Convert, node: fx.Node) -> None:
    weight = _argument(node, 2, "weight")
    leaves = {} if weight is None else {"weight": c.path(weight)}
    layer = L.RMSNorm(tuple(node.args[1]), _argument(node, 3, "eps"), weight is not None)  # type: ignore[arg-type]
    c.add(node, layer, (c.tensor(_node(node.args[0])),), leaves=leaves)


def _group_norm(c: Convert, node: fx.Node) -> None:
    x, groups, weight, bias = (_argument(node, k, n) for k, n in enumerate(("input", "num_groups", "weight", "bias")))
    if (weight is None) != (bias is None):
        raise Unmapped
    leaves = {} if weight is None else {"weight": c.path(weight), "bias": c.path(bias)}
    layer = L.GroupNorm(groups, measured(_node(x))[0][1], _argument(node, 4, "eps", 1e-5), weight is not None)
    c.add(node, layer, (c.tensor(_node(x)),), leaves=leaves)


def _embedding(c: Convert, node: fx.Node) -> None:
    path = c.path(node.args[0])
    rows, width = c.tensors[path].shape
    c.add(node, L.Embedding(rows, width), (c.tensor(_node(node.args[1])),), leaves={"weight": path})


def _prelu(c: Convert, node: fx.Node) -> None:
    path = c.path(node.args[1])
    c.add(node, L.PReLU(c.tensors[path].numel()), (c.tensor(_node(node.args[0])),), leaves={"weight": path})


def _simple(kind: Callable[..., Layer], *fields: tuple[str, Any]) -> Callable[[Convert, fx.Node], None]:
    """An operator whose further arguments are the layer's fields."""

    def convert(c: Convert, node: fx.Node) -> None:
        values = [_argument(node, k + 1, name, default) for k, (name, default) in enumerate(fields)]
        if any(isinstance(value, fx.Node) for value in values) or len(node.args) > len(fields) + 1:
            raise Unmapped
        c.add(node, kind(*values), (c.tensor(_node(node.args[0])),))

    return convert


def _hardtanh(c: Convert, node: fx.Node) -> None:
    if (_argument(node, 1, "min_val", -1.0), _argument(node, 2, "max_val", 1.0)) != (0, 6):
        raise Unmapped
    c.add(node, L.ReLU6(), (c.tensor(_node(node.args[0])),))


def _maps(c: Convert, node: fx.Node) -> None:
    shape, axis = measured(node)
    if axis != 0 or len(shape) < 3:
        raise Unmapped
    c.operator(node, L.Maps, space=shape[2:])


def _max_pool2d(c: Convert, node: fx.Node) -> None:
    x, kernel = _node(node.args[0]), node.args[1]
    if measured(x)[1] != 0 or len(measured(x)[0]) != 4:
        raise Unmapped
    names = (("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
    stride, padding, dilation, ceil = (_argument(node, k + 2, *a) for k, a in enumerate(names))

    def each(value: Any) -> Any:
        return value if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)

    window = L.MaxPool2d(each(kernel), each(stride) if stride else None, each(padding), each(dilation), ceil_mode=ceil)
    c.add(node, window, (c.tensor(x),))


def _adaptive(c: Convert, node: fx.Node) -> None:
    x, size = _node(node.args[0]), node.args[1]
    if measured(x)[1] != 0 or len(measured(x)[0]) != 4:
        raise Unmapped
    c.add(node, L.AdaptiveAvgPool2d(tuple(size)), (c.tensor(x),))  # type: ignore[arg-type]


def _softmax(c: Convert, node: fx.Node) -> None:
    if _argument(node, 2, "dtype") or _argument(node, 2, "half_to_float"):
        raise Unmapped
    x = _node(node.args[0])
    c.add(node, L.Softmax(node.args[1]), (c.tensor(x),))  # type: ignore[arg-type]


def _view(c: Convert, node: fx.Node) -> None:
    x = _node(node.args[0])
    (before, given), (after, made) = measured(x), measured(node)
    if (given < 0) != (made < 0):
        raise Unmapped
    if (before, given) == (after, made):
        c.alias(node)
    else:
        c.add(node, L.View(after, given, made), (c.tensor(x),))


def _permute(c: Convert, node: fx.Node) -> None:
    x = _node(node.args[0])
    rank = len(measured(x)[0])
    dims = list(range(rank))
    given: Any = node.args[1:]
    if str(node.target) == "aten.permute.default":
        dims = [d % rank for d in given[0]]
    elif rank > 1:
        a, b = (0, 1) if str(node.target) == "aten.t.default" else (d % rank for d in given)
        dims[a], dims[b] = dims[b], dims[a]
    c.add(node, L.Permute(tuple(dims)), (c.tensor(x),))


def _expand(c: Convert, node: fx.Node) -> None:
    x = _node(node.args[0])
    (before, given), (after, made) = measured(x), measured(node)
    lead = len(after) - len(before)
    kept = [k >= lead and before[k - lead] == n and (k != made or given >= 0) for k, n in enumerate(after)]
    sizes = tuple(-1 if keep else n for keep, n in zip(kept, after, strict=True))
    if given >= 0 and given + lead != made:
        raise Unmapped
    if all(n == -1 for n in sizes):
        c.alias(node)
        return
    fresh = made if given < 0 and made >= 0 else -1
    if fresh >= 0 and (after[fresh] != 1 or c.reference is None):
        raise Unmapped
    c.add(node, L.Expand(sizes, fresh), (c.tensor(x), *([c.reference] if fresh >= 0 and c.reference else [])))


def _slice(c: Convert, node: fx.Node) -> None:
    x, dim = _node(node.args[0]), _argument(node, 1, "dim", 0)
    shape, axis = measured(x)
    dim %= len(shape)
    start, stop, step = _argument(node, 2, "start"), _argument(node, 3, "end"), _argument(node, 4, "step", 1)
    if measured(node) == (shape, axis):
        c.alias(node)
        return
    if step != 1:
        _along(1, "dim")(c, node)
        return
    if dim == axis or not all(v is None or isinstance(v, int) for v in (start, stop)):
        raise Unmapped
    start, stop, _ = slice(start, stop).indices(shape[dim])
    c.slice(node, x, dim, start, stop)


def _select(c: Convert, node: fx.Node) -> None:
    arguments: Any = node.args
    x, dim, index = arguments
    shape, _ = measured(_node(x))
    if not isinstance(index, int):
        raise Unmapped
    dim, index = dim % len(shape), index % shape[dim % len(shape)]
    c.slice(node, _node(x), dim, index, index + 1, drop=True)


def _parts(c: Convert, node: fx.Node) -> None:
    """Each piece is a slice, written where it is taken."""


def _cat(c: Convert, node: fx.Node) -> None:
    tensors: Any = node.args[0]
    dim = _argument(node, 1, "dim", 0) % len(measured(node)[0])
    if any(measured(t)[1] != measured(node)[1] for t in tensors) or dim == measured(node)[1]:
        raise Unmapped
    c.add(node, L.Concat(dim), [c.tensor(t) for t in tensors])


def _stack(c: Convert, node: fx.Node) -> None:
    tensors: Any = node.args[0]
    after, made = measured(node)
    dim = _argument(node, 1, "dim", 0) % len(after)
    thick = (*after[:dim], 1, *after[dim + 1 :])
    if any(measured(t)[1] < 0 for t in tensors) and made >= 0:
        raise Unmapped
    layers = [L.View(thick, measured(t)[1], made) for t in tensors]
    views = [c.add(node, v, (c.tensor(t),), tag=f"_{k}") for k, (t, v) in enumerate(zip(tensors, layers, strict=True))]
    c.add(node, L.Concat(dim), views)


def _pair(kind: Callable[..., Layer]) -> Callable[[Convert, fx.Node], None]:
    """A sum or product of two tensors is the layer; with a number it is any pointwise operator."""

    def convert(c: Convert, node: fx.Node) -> None:
        pair = [x for x in node.args[:2] if isinstance(x, fx.Node)]
        if len(pair) == 2 and not node.kwargs and node.meta["val"].dtype in {x.meta["val"].dtype for x in pair}:
            c.add(node, kind(), [c.tensor(x) for x in pair])
        else:
            c.generic(node)

    return convert


def _reduce(c: Convert, node: fx.Node) -> None:
    x, dims = _node(node.args[0]), _argument(node, 1, "dim")
    shape, axis = measured(x)
    dims = tuple(d % len(shape) for d in dims) if dims else tuple(range(len(shape)))
    if axis in dims or _argument(node, 3, "dtype"):
        raise Unmapped
    op = str(node.target).split(".")[1]
    c.add(node, L.Reduce(op, dims, bool(_argument(node, 2, "keepdim", False))), (c.tensor(x),))


def _matmul(c: Convert, node: fx.Node) -> None:
    one, other = _node(node.args[0]), _node(node.args[1])
    if len(measured(one)[0]) < 2 or len(measured(other)[0]) < 2:
        raise Unmapped
    c.add(node, L.MatMul(), (c.tensor(one), c.tensor(other)))


def _einsum(c: Convert, node: fx.Node) -> None:
    equation, tensors = node.args[:2]
    assert isinstance(equation, str)
    parts = equation.replace(" ", "").partition("->")
    if "." in equation or not parts[1] or any(len(set(part)) < len(part) for part in (*parts[0].split(","), parts[2])):
        raise Unmapped
    c.add(node, L.Einsum(equation), [c.tensor(x) for x in tensors])  # type: ignore[union-attr,arg-type]


def _attention(c: Convert, node: fx.Node) -> None:
    q, k, v = (_node(x) for x in node.args[:3])
    mask, causal = _argument(node, 3, "attn_mask"), _argument(node, 5, "is_causal", False)
    scale, grouped = _argument(node, 6, "scale"), _argument(node, 7, "enable_gqa", False)
    shapes = [measured(x)[0] for x in (q, k, v)]
    if len({len(shape) for shape in shapes}) > 1 or len(shapes[0]) < 3:
        raise Unmapped
    grouped = grouped and shapes[0][-3] != shapes[1][-3]
    scale = shapes[0][-1] ** -0.5 if scale is None else scale
    inputs = [q, k, v, *([_node(mask)] if mask is not None else [])]
    c.add(node, L.ScaledDotProduct(scale, causal, grouped), [c.tensor(x) for x in inputs])


def _pad(c: Convert, node: fx.Node) -> None:
    x, pad = _node(node.args[0]), tuple(node.args[1])  # type: ignore[arg-type]
    constant = str(node.target) == "aten.constant_pad_nd.default"
    mode = "constant" if constant else _argument(node, 2, "mode", "constant")
    value = _argument(node, 2 if constant else 3, "value", 0.0) or 0.0
    shape, axis = measured(x)
    if not all(isinstance(n, int) for n in pad) or (axis >= 0 and len(shape) - 1 - axis < len(pad) // 2):
        raise Unmapped
    c.add(node, L.Pad(pad, mode, float(value)), (c.tensor(x),))


def _index(c: Convert, node: fx.Node) -> None:
    x, indices = _node(node.args[0]), node.args[1]
    given = [(k, i) for k, i in enumerate(indices) if i is not None]  # type: ignore[arg-type]
    if len(given) != 1 or measured(x)[1] == given[0][0]:
        raise Unmapped
    dim, index = given[0]
    if _node(index).meta["val"].dtype != torch.long:
        raise Unmapped
    c.add(node, L.Gather(dim), (c.tensor(x), c.tensor(_node(index))))


def _along(position: int, name: str) -> Callable[[Convert, fx.Node], None]:
    """An operator that works along some axes, and changes their sizes at most."""

    def convert(c: Convert, node: fx.Node) -> None:
        dims = _argument(node, position, name)
        (before, axis), (after, _) = measured(_node(node.args[0])), measured(node)
        dims = tuple(d % len(before) for d in ((dims,) if isinstance(dims, int) else dims or ()))
        if not dims or axis in dims:
            raise Unmapped
        kept = [n for k, n in enumerate(before) if k not in dims]
        if len(after) == len(before):
            lengths = tuple(after[d] for d in dims)
            rest = [n for k, n in enumerate(after) if k not in dims]
        else:
            lengths, rest = (0,) * len(dims), list(after)
        if kept != rest:
            raise Unmapped
        c.operator(node, L.Along, dims=dims, lengths=None if after == before else lengths)

    return convert


def _glu(c: Convert, node: fx.Node) -> None:
    x = _node(node.args[0])
    shape, axis = measured(x)
    dim = _argument(node, 1, "dim", -1) % len(shape)
    if dim == axis:
        raise Unmapped
    half, name = shape[dim] // 2, c.tensor(x)
    one = c.add(node, L.Slice(dim, 0, half), (name,), tag="_value")
    other = c.add(node, L.Slice(dim, half, 2 * half), (name,), tag="_gate")
    opened = c.add(node, L.Sigmoid(), (other,), tag="_sigmoid")
    c.add(node, L.Multiply(), (one, opened))


def _slice_scatter(c: Convert, node: fx.Node) -> None:
    x, source = _node(node.args[0]), _node(node.args[1])
    dim, start, stop = (_argument(node, *a) for a in ((2, "dim", 0), (3, "start", None), (4, "end", None)))
    shape, axis = measured(x)
    dim %= len(shape)
    if dim == axis or _argument(node, 5, "step", 1) != 1 or measured(source)[1] != axis:
        raise Unmapped
    start, stop, _ = slice(start, stop).indices(shape[dim])
    name, pieces = c.tensor(x), [c.tensor(source)]
    if start > 0:
        pieces.insert(0, c.add(node, L.Slice(dim, 0, start), (name,), tag="_before"))
    if stop < shape[dim]:
        pieces.append(c.add(node, L.Slice(dim, stop, shape[dim]), (name,), tag="_behind"))
    c.add(node, L.Concat(dim), pieces)


def _pointwise(c: Convert, node: fx.Node) -> None:
    c.operator(node, L.Elementwise)


def _identity(c: Convert, node: fx.Node) -> None:
    source = _node(node.args[0])
    if source.meta["val"].dtype != node.meta["val"].dtype:
        c.operator(node, L.Elementwise)
    else:
        c.alias(node)


def _dropout(c: Convert, node: fx.Node) -> None:
    c.add(node, L.Dropout(float(node.args[1])), (c.tensor(_node(node.args[0])),))  # type: ignore[arg-type]


CONVERTERS: dict[str, Callable[[Convert, fx.Node], None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"), _convolution),
    "linear": _linear,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "prelu": _prelu,
    "relu": _simple(L.ReLU),
    "relu6": _simple(L.ReLU6),
    "hardtanh": _hardtanh,
    "leaky_relu": _simple(L.LeakyReLU, ("negative_slope", 0.01)),
    "gelu": _simple(L.GELU, ("approximate", "none")),
    "silu": _simple(L.SiLU),
    "mish": _simple(L.Mish),
    "sigmoid": _simple(L.Sigmoid),
    "tanh": _simple(L.Tanh),
    "softplus": _simple(L.Softplus, ("beta", 1.0), ("threshold", 20.0)),
    "hardswish": _simple(L.Hardswish),
    "hardsigmoid": _simple(L.Hardsigmoid),
    "dropout": _dropout,
    "pixel_shuffle": _simple(L.PixelShuffle, ("upscale_factor", 1)),
    "channel_shuffle": _simple(L.ChannelShuffle, ("groups", 1)),
    "max_pool2d": _max_pool2d,
    "adaptive_avg_pool2d": _adaptive,
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool3d", "adaptive_avg_pool1d",
         "adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
         "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
        _maps,
    ),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _view
    ),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _parts),
    "cat": _cat,
    "stack": _stack,
    "add": _pair(L.Add),
    "mul": _pair(L.Multiply),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    "index": _index,
    "glu": _glu,
    "slice_scatter": _slice_scatter,
    "pixel_unshuffle": _simple(L.PixelUnshuffle, ("downscale_factor", 1)),
    **dict.fromkeys(("zero", "fill", "zeros_like", "ones_like", "full_like"), _pointwise),
    **dict.fromkeys(("var", "std", "prod", "logsumexp", "all", "any", "argmax", "argmin"), _along(1, "dim")),
    "linalg_vector_norm": _along(2, "dim"),
    "roll": _along(2, "dims"),
    "flip": _along(1, "dims"),
    "cumsum": _along(1, "dim"),
    "log_softmax": _along(1, "dim"),
    "_log_softmax": _along(1, "dim"),
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "_to_copy", "to"), _identity
    ),
}  # fmt: skip
