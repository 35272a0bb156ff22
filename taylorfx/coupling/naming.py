"""Naming: what the scopes of a captured module are called.

``torch.export`` numbers what it has no name for (``view_7``), and numbers it anew at other sizes of the inputs. The
names of scopes follow from the module's own names and from what its layers do along the units:

    stream                              the residual stream: a sum of what several layers write, one after the other
    layers.3.self_attn: heads           an axis of both factors of a product of activations, and of the product
    layers.3.self_attn: query/key dims  an axis along which two activations are contracted
    layers.3.self_attn: value dims      an axis of one of the factors, and of the product
    layers.3.self_attn: head dims       both: one layer writes queries, keys and values
    layers.3.mlp: hidden                all matrices of the module shrink with it; also a recurrent layer's state
    layers.3.mlp: experts               linear maps of which a router chooses some at every position
    layer1.0: groups                    the groups of a convolution; also the channels into and out of each group
    layer1.0.conv1                      what one layer alone writes
    layer2.0: channels                  what several layers write
    layers.3.mlp: branch                a residual branch, by the path of its matrices; where branches are units

Before the colon stands the path that the parameters which shrink with the scope have in common.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from taylorfx.coupling.axes import Axes
from taylorfx.coupling.labeling import Labeling
from taylorfx.layers.axes import Product, Signature, expand, letters
from taylorfx.layers.roles import Experts, Mixing, Sum
from taylorfx.network.labels import Labeled, Labels, is_example
from taylorfx.network.spec import Node, Spec

__all__ = ["Facts", "branch_name", "facts_of", "names_by_role"]

STREAM = "stream"
INNER = "query/key dims"
HEADS = "heads"
GROUPED = "key/value heads"
QUERIES = "query heads per key/value head"
VALUES = "value dims"
BOTH = "head dims"
EXPERTS = "experts"
GROUPS = "groups"
INTO_GROUP = "channels into each group"
OUT_OF_GROUP = "channels out of each group"
HIDDEN = "hidden"
CHANNELS = "channels"
BRANCH = "branch"

GROUPED_ROLES = (GROUPS, INTO_GROUP, OUT_OF_GROUP)
WEAK, STRONG = (*GROUPED_ROLES, VALUES), (QUERIES, HEADS, GROUPED, INNER, BOTH, EXPERTS)
"""Roles, each stronger than those before it. A stream may have a weak one; it is none where it has a strong one."""

CONSTANTS = "constants."
"""How the paths of tensors begin that the capture computed; the module does not have them."""


@dataclass
class Facts:
    """What is known of each scope, by its number.

    Attributes:
        paths: the parameters of the module that shrink with it, in order.
        writers: the paths of the layers that write it, in order, and the nodes.
        written: the parameters of these layers.
        roles: its role in products of activations and in groups, and the nodes where it has the role.
        streams: those that are sums of what several layers write, one after the other.
        stacked: the parameters that have a matrix for every expert.
        states: the path of the first recurrent layer whose state it is.
    """

    paths: dict[int, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    writers: dict[int, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    written: dict[int, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    roles: dict[int, str] = field(default_factory=dict)
    streams: set[int] = field(default_factory=set)
    stacked: set[str] = field(default_factory=set)
    states: dict[int, str] = field(default_factory=dict)

    def write(self, scopes: Iterable[int], path: str, node: Node, *weights: Node) -> None:
        """A node writes these scopes, perhaps with weights that other nodes compute."""
        paths = [path for one in (node, *weights) for path in one.paths.values()]
        for scope in scopes:
            self.writers[scope][path] = node.name
            self.written[scope].update((path, None) for path in paths if path in self.paths[scope])

    def play(self, scopes: Iterable[int], role: str) -> None:
        """These scopes have a role; of several the strongest counts."""
        order = (*WEAK, *STRONG)
        for scope in scopes:
            other = self.roles.get(scope, role)
            self.roles[scope] = BOTH if {role, other} == {INNER, VALUES} else max(role, other, key=order.index)


def names_by_role(facts: Facts, spec: Spec, scopes: Iterable[int], origins: Sequence[str]) -> tuple[str, ...]:
    """The names of the scopes of a captured module, all different.

    Args:
        scopes: those that are named; the others have no units and are shown nowhere.
        origins: the node, or node and letter, that creates the labels of each scope.
    """
    shapes, several = spec.shapes, len(facts.streams) > 1
    names = list(origins)
    seen: Counter[str] = Counter()
    wanted = {scope: _name(facts, scope, shapes, several) for scope in scopes}
    often = Counter(wanted.values())
    for scope, (path, role) in wanted.items():
        if often[path, role] > 1:  # of several streams in one module each has the path of its first layer
            path = next(iter(facts.writers[scope]), path)
        name = ": ".join(filter(None, (path, role))) or _unnumbered(origins[scope])
        seen[name] += 1
        names[scope] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return tuple(names)


def _name(facts: Facts, scope: int, shapes: Mapping[str, tuple[int, ...]], several: bool) -> tuple[str, str]:
    """The path and the role of one scope; both empty where no parameter and no layer of the module has it."""
    paths, writers = list(facts.paths[scope]), list(facts.writers[scope])
    role = facts.roles.get(scope)
    if scope in facts.streams:
        return _common(writers) if several else "", f"{STREAM}, {role}" if role in GROUPED_ROLES else STREAM
    if scope in facts.states and role is None:
        return facts.states[scope], HIDDEN
    block = _common(map(_module, paths))
    if role:
        return block, role
    flat = all(len(shapes[path]) - (path in facts.stacked) <= 2 for path in paths)
    if writers and flat and block and _whole(block, paths, shapes):
        return block, HIDDEN
    if len(writers) > 1 and (shared := _common(writers)):
        return shared, HIDDEN if flat else CHANNELS
    return next(iter(writers or paths), ""), ""


def _whole(block: str, paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all matrices of a module shrink with the scope of these parameters."""
    matrices = [path for path, shape in shapes.items() if path.startswith(f"{block}.") and len(shape) > 1]
    return len(matrices) > 1 and {*matrices} <= {*paths}


def branch_name(paths: Iterable[str], node: str) -> str:
    """The name of a residual branch with these parameters, of a sum that this node is.

    >>> branch_name(["layers.3.mlp.up.weight", "layers.3.mlp.down.weight"], "add_7")
    'layers.3.mlp: branch'
    """
    block = _common(_module(path) for path in paths if not path.startswith(CONSTANTS))
    return f"{block or _unnumbered(node)}: {BRANCH}"


def _module(path: str) -> str:
    """The path of the module that has a parameter.

    >>> _module("layers.3.mlp.up_proj.weight")
    'layers.3.mlp.up_proj'
    """
    return path.rpartition(".")[0]


def _common(paths: Iterable[str]) -> str:
    """The path that all of these begin with.

    >>> _common(["layers.3.mlp.up", "layers.3.mlp.down"])
    'layers.3.mlp'
    >>> _common(["layer1", "layer2"])
    ''
    """
    parts = [path.split(".") for path in paths]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len({*column}) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _unnumbered(origin: str) -> str:
    """The name of a node without the number that the capture gave it.

    >>> _unnumbered("view_7.x1"), _unnumbered("constants.unsqueeze_9")
    ('view.x1', 'constants.unsqueeze')
    """
    return re.sub(r"_\d+(?=\.|$)", "", origin)


def facts_of(labeling: Labeling, axes: Axes, of_class: Labels) -> Facts:
    """Collect what is known of the scopes.

    Args:
        of_class: ``(classes + 1,)``, the scope of every class that is no product; -1 for others, and at the end.
    """
    along = _Along(axes, of_class)
    facts, spec = Facts(), labeling.spec
    for path, tensor in labeling.ties.parameters.items():
        if not path.startswith(CONSTANTS):
            for scope in sorted(set[int]().union(*map(along, tensor))):
                facts.paths[scope][path] = None
    for site in labeling.writes:
        if site.example is not None:  # others are parameters, which a layer applies
            facts.write(along(site.labels), _place(spec[site.node]), spec[site.node])
    varies = {name for name, bound in labeling.bounds.items() if any(map(is_example, bound.output))}
    for node in spec.nodes:
        if node.layer.multiplies and node.name in varies and not node.layer.recurrent:
            _product(labeling, node, varies, along, facts)
        for letter in node.layer.recurrent:
            for scope in along(labeling.bounds[node.name].letters[letter]):
                facts.states.setdefault(scope, _place(node))
        if experts := node.layer.role(Experts):
            facts.play(along(labeling.bounds[node.name].letters[experts.letter]), EXPERTS)
            facts.stacked.update(node.paths.values())
    strong = {scope for scope, role in facts.roles.items() if role in STRONG}
    facts.streams |= _streams(labeling, varies, along, facts) - strong
    return facts


class _Along:
    """The scopes that the positions of an axis are of."""

    def __init__(self, axes: Axes, of_class: Labels) -> None:
        scopes, starts = of_class[axes.classes], axes.starts
        low, high = (end.reduceat(scopes, starts, 1) for end in (np.minimum, np.maximum))
        ends = np.append(starts[1:], scopes.shape[1])
        self.numbers = axes.numbers
        self.sets: dict[int, set[int]] = defaultdict(set)
        for row, run in np.argwhere(high >= 0).tolist():
            one = self.sets[int(axes.owners[run])]
            if low[row, run] == high[row, run]:
                one.add(int(high[row, run]))
            else:  # -1 marks positions that are of none
                one.update(x for x in np.unique(scopes[row, starts[run] : ends[run]]).tolist() if x >= 0)

    def __call__(self, axis: Labeled) -> set[int]:
        return self.sets.get(self.numbers.get(id(axis), -1), set())


def _place(node: Node) -> str:
    """The path of a layer in the module."""
    path = next(iter(node.paths.values()), "")
    return (path if node.layer.leaf else _module(path)) or _unnumbered(node.name)


def _product(labeling: Labeling, node: Node, varies: Set[str], along: _Along, facts: Facts) -> None:
    """Read off a layer that multiplies what the scopes along its letters are to it."""
    bound, spec = labeling.bounds[node.name], labeling.spec
    text = node.layer.signature(*bound.inputs)
    if text is None:
        return
    signature = expand(text, tuple(map(len, bound.inputs)))
    scopes = {x: along(axis) for x, axis in bound.letters.items()}
    inputs = [{*letters(pattern)} for pattern, x in zip(signature.inputs, node.inputs, strict=True) if x in varies]
    out = {*letters(signature.output)}
    if len(inputs) > 1:
        for letter, role in _shared(signature, inputs, out):
            facts.play(scopes.get(letter, ()), role)
        _grouped(signature, scopes, facts)
    elif len(inputs) < len(node.inputs):  # with a weight of its own that other nodes compute
        weights = [x for x in node.inputs if x not in varies]
        written = set[int]().union(*(scopes.get(x, ()) for x in out - inputs[0] if inputs))
        if written:
            sources = [one for one in spec.nodes if one.paths and one.name in spec.upstream(weights)]
            path = next((path for one in sources for path in one.paths.values() if not path.startswith(CONSTANTS)), "")
            facts.write(written, _module(path) or path or _unnumbered(weights[0]), node, *sources)
    mixing = node.layer.role(Mixing)
    if mixing is not None and mixing.groups > 1:
        within, without, groups = mixing.letters
        if groups and bound.sizes.get(within, 1) > 1:  # a depthwise convolution has a channel in each
            facts.play(scopes.get(groups, ()), GROUPS)
            facts.play(scopes.get(within, ()), INTO_GROUP)
            facts.play(scopes.get(without, ()), OUT_OF_GROUP)


def _shared(signature: Signature, inputs: Sequence[Set[str]], out: Set[str]) -> Iterator[tuple[str, str]]:
    """The roles of letters in a product of activations.

    >>> queries_and_keys = expand("B h T k, B h S k -> B h T S", (4, 4))
    >>> sets = [{*letters(x)} for x in queries_and_keys.inputs]
    >>> [pair for pair in _shared(queries_and_keys, sets, {*letters(queries_and_keys.output)}) if pair[0] in "hk"]
    [('h', 'heads'), ('k', 'query/key dims')]
    """
    for letter in sorted(set[str]().union(*inputs)):
        count = sum(letter in one for one in inputs)
        if letter.islower() and (count > 1 or letter in out):
            yield letter, VALUES if count == 1 else HEADS if letter in out else INNER


def _grouped(signature: Signature, scopes: Mapping[str, Set[int]], facts: Facts) -> None:
    """Tell key heads from the query heads that each of them serves: what shrinks more parameters is the former."""
    for product in _heads(signature):
        together = set[int]().union(*(scopes.get(x, ()) for x in product))
        heads = sorted(together, key=lambda scope: len(facts.paths[scope]))
        if len(heads) > 1 and {*facts.paths[heads[0]]} < {*facts.paths[heads[-1]]}:
            facts.play(heads[-1:], GROUPED)
            for scope in heads[:-1]:
                facts.roles[scope] = QUERIES


def _heads(signature: Signature) -> Iterator[Product]:
    """The letters of every axis of the output that lies in several inputs, too."""
    for axis in signature.output:
        for product in axis:
            if product and sum({*product} & {*letters(pattern)} != set() for pattern in signature.inputs) > 1:
                yield product


def _streams(labeling: Labeling, varies: Set[str], along: _Along, facts: Facts) -> set[int]:
    """The scopes of sums of several activations, of which a layer consumes what another one wrote before."""
    spec = labeling.spec
    summed: set[int] = set()
    for node in spec.nodes:
        if node.layer.role(Sum) and sum(x in varies for x in node.inputs) > 1:
            summed.update(*(along(axis) for axis in labeling.bounds[node.name].letters.values()))
    streams: set[int] = set()
    for scope in summed:
        nodes = list(facts.writers[scope].values())
        if len(nodes) > 1 and not spec.downstream(nodes[:1]).isdisjoint(nodes[1:]):
            streams.add(scope)
    return streams
