"""The document that a spec is on disk: read back as it was written, and refused with its place where it is wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import time

import hypothesis.strategies as st
import modules
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import HealthCheck, given, settings

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers import operators
from taylorfx.testing.strategies import network

X = {"name": "x", "layer": "Input", "fields": {"shape": [3]}, "inputs": []}
RELU = {"name": "r", "layer": "ReLU", "fields": {}, "inputs": ["x"]}


def node(layer, name="n", inputs=("x",), **fields):
    return {"name": name, "layer": layer, "fields": fields, "inputs": list(inputs)}


def captured(op, args=(("$", 0),), inputs=("x",), **fields):
    return node("Captured", inputs=inputs, op=op, args=args, **{"shape": [1, 3], "made": 0, "given": [0], **fields})


def document(*nodes, outputs=(), **more):
    return json.dumps({"nodes": nodes, "outputs": outputs, **more})


def refusal(text, **options):
    with pytest.raises(tfx.FileError) as caught:
        tfx.from_json(text, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_document_gives_the_spec_that_it_was_written_of(name):
    spec = network(CONSTRUCTS[name]).spec
    text = tfx.to_json(spec)
    again = tfx.from_json(text)
    assert again == spec
    assert hash(again) == hash(spec)
    assert tfx.to_json(again) == text
    assert json.loads(text)["version"] == 1


def test_a_document_without_a_version_is_read():
    data = json.loads(tfx.to_json(CONSTRUCTS["chain"]))
    del data["version"]
    assert tfx.from_json(json.dumps(data)) == CONSTRUCTS["chain"]


@pytest.mark.parametrize("version", [2, 0, True, 1.0, "1", None])
def test_another_version_is_refused_by_name_and_nothing_else_is_said(version):
    message = refusal(json.dumps({"version": version, "gates": 3}))
    assert f"version: {version!r} is unknown, 1 is known" in message
    assert "gates" not in message


WRONG = {
    "no JSON": ("{", "is JSON; this text is not: .*line 1 column 2"),
    "bytes": (b"{}", "is a string; received bytes"),
    "a number": ("3", "received an integer"),
    "a string": ('"x"', "received a string"),
    "nothing": ("{}", "nodes: missing\n  outputs: missing\n  nodes: a network has 1 to .* nodes, received 0"),
    "null for nodes": ('{"nodes": null, "outputs": []}', "nodes: expected a list, received null"),
    "an unknown entry": (document(X, gates=1), "gates: unknown; known are version, nodes, outputs, keys, in"),
    "an entry twice": ('{"nodes": [], "nodes": []}', "one object has the name 'nodes' twice"),
    "a node that is none": (document(X, 3), r"nodes\[1\]: expected an object, received an integer"),
    "a node without a layer": (document({"name": "x"}), r"nodes\[0\].layer: missing\n  nodes\[0\].fields: missing"),
    "a node with more": (document({**X, "dtype": 1}), r"nodes\[0\].dtype: unknown; known are name"),
    "a class that is not known": (document(X, node("os.system")), r"nodes\[1\].layer: unknown: 'os.system'. Import"),
    "a class of no layer": (document(X, node("_Operator")), r"nodes\[1\].layer: unknown: '_Operator'"),
    "a class that is a list": (document(X, node(["ReLU"])), r"nodes\[1\].layer: unknown: \[\"ReLU\"\]"),
    "a field that no layer has": (document(X, node("ReLU", z=1)), r"nodes\[1\].fields.z: unknown; known are none"),
    "a field that is missing": (document(X, node("Linear", in_features=3)), r"nodes\[1\].fields.out_features: missing"),
    "a boolean for a size": (
        document(X, node("Linear", in_features=3, out_features=True)),
        r"nodes\[1\].fields.out_features: expected an integer, received True",
    ),
    "a number with a point for a size": (document(X, node("Linear", in_features=3.0, out_features=4)), "in_features"),
    "a string for a size": (document(X, node("Linear", in_features="3", out_features=4)), "in_features: expected an"),
    "a number for a boolean": (document(X, node("Linear", in_features=3, out_features=4, bias=1)), "fields.bias"),
    "a size in a list": (document(X, node("MaxPool2d", kernel_size=[3, None])), r"nodes\[1\].fields.kernel_size: "),
    "65 axes": (document({**X, "fields": {"shape": [1] * 65}}), "shape: expected a list of at most 64 integers"),
    "fields that are a list": (document({**X, "fields": []}), r"nodes\[0\].fields: expected an object"),
    "a layer's own rule": (
        document(X, node("Conv2d", in_channels=3, out_channels=4, kernel_size=1, groups=2)),
        r"nodes\[1\].fields: Groups divide the input and the output channels",
    ),
    "a size of none": (document(X, node("Linear", in_features=0, out_features=4)), r"nodes\[1\].fields: .*at least 1"),
    "a name that is a number": (document({**X, "name": 3}), r"nodes\[0\].name: expected a name, received an integer"),
    "no name": (document({**X, "name": ""}), r"nodes\[0\].name: a name has 1 to 512 characters"),
    "a long name": (document({**X, "name": "a" * 513}), r"nodes\[0\].name: a name has 1 to 512 characters"),
    "a name of 3,000 parts": (document({**X, "name": ".".join("a" * 3000)}), r"nodes\[0\].name: .* at most 64 parts"),
    "a name twice": (document(X, X), r"nodes\[1\].name: 'x' is already the name of nodes\[0\]"),
    "an input of no node": (document(X, {**RELU, "inputs": ["y"]}), r"nodes\[1\].inputs\[0\]: no node is named 'y'"),
    "inputs that are a string": (document(X, {**RELU, "inputs": "x"}), "inputs: expected a list, received a string"),
    "an output of no node": (document(X, outputs=["y"]), r"outputs\[0\]: no node is named 'y'"),
    "keys of no output": (document(X, outputs=["x"], keys=["a", "b"]), "keys: expected one for each output"),
    "a call that is a list": (document(X, interface=[]), "interface: expected an object"),
    "a call of other entries": (document(X, interface={"forward": "exec"}), "interface: .*'forward'"),
    "an argument of no input": (
        document(X, interface={"arguments": [{"name": "x", "inputs": [["", "y"]]}]}), "no Input node is named 'y'",
    ),
    "steps of none": (document({**X, "fields": {"shape": [3], "ranges": [[1, None, 0]]}}), "in steps of at least 1"),
    "an input's dtype": (document({**X, "fields": {"shape": [3], "dtype": "ops"}}), "one of torch's dtypes"),
    "a cycle": (document(X, {**RELU, "inputs": ["r"]}), "nodes: .*'r' lie on or behind a cycle"),
    "paths that are a number": (document(X, {**RELU, "params": 3}), r"nodes\[1\].params: expected the path"),
    "paths in one": (
        document(X, node("Parameter", "a", (), shape=[3]), node("Linear", "a.b", in_features=3, out_features=3)),
        "'a.b.weight' lies below another one",
    ),
    "shapes that differ": (
        document(X, *({**node("Linear", f"l{k}", in_features=3, out_features=k), "params": "w"} for k in (3, 4))),
        "w.weight: l4 expects",
    ),
    "depth": ("[" * 100_000, "nests lists and objects at most 64 deep"),
    "depth in a field": (document(X, captured("relu.default", json.loads("[" * 70 + "]" * 70))), "at most 64 deep"),
    "a number of 66 bits": (document({**X, "fields": {"shape": [2**65]}}), "integers have 64 bits, received 3689"),
    "a number of 9,999 digits": ('{"nodes": [' + "9" * 9999 + "]}", "is JSON; this text is not|64 bits"),
    "an unknown reduction": (document(X, node("Reduce", op="save", dims=[1])), "fields: Reduce takes one of"),
    "an unknown dtype": (
        document(X, captured("to.dtype", (("$", 0), ("dtype", "ops")))),
        r"nodes\[1\].fields: aten::to takes other arguments .*\('dtype', 'ops'\) for dtype",
    ),
    "an input that there is not": (document(X, captured("relu.default", (("$", 1),))), "fields.args: .* input 1"),
    "a device": (document(X, captured("zeros_like.default", kwargs=[["device", "cuda"]])), "'cuda' for device"),
    "an unknown argument": (document(X, captured("relu.default", kwargs=[["out", ["$", 0]]])), "'out', which it does"),
    "an argument too many": (document(X, captured("relu.default", (("$", 0), 1))), "2 arguments, where it takes 1"),
    "an argument too few": (document(X, captured("add.Tensor")), "no other"),
    "a result that there is not": (document(X, captured("topk.default", (("$", 0), 1), item=2)), "item=2 of 2 results"),
    "no choice of results": (document(X, captured("topk.default", (("$", 0), 1))), "item=None of 2 results"),
    "running statistics in training": (
        document(X, captured("batch_norm.default", (*((("$", 0),) * 5), True, 0.1, 1e-5, False))),
        "training=True, by which it writes to the running statistics",
    ),
    "a thousand layers and one": (
        document(X, node("LSTM", input_size=3, hidden_size=3, num_layers=2**40)), "has 1 to 1,000 layers",
    ),
    "a weight of 16 TB": (
        document(X, node("Linear", in_features=2**20, out_features=2**22, bias=False)),
        r"nodes\[1\].fields: weight would be 4,398,046,511,104 elements",
    ),
    "an axis without end": (document(X, node("Parameter", inputs=(), shape=[2**40])), "would be an axis of 1,099"),
    "a value of 1 TB": (
        document(X, node("Upsample", scale_factor=2**30)) .replace('"shape": [3]', '"shape": [3, 64, 64]'),
        r"nodes\[1\]: gives an axis of 68,719,476,736 positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_document_that_is_wrong_is_refused_with_the_place(name):
    text, expected = WRONG[name]
    with pytest.raises(tfx.FileError, match=f"(?s){expected}") as caught:
        tfx.from_json(text)
    assert len(str(caught.value)) < 2000


def test_everything_that_is_wrong_is_said_at_once():
    message = refusal(
        document(
            node("Conv9d", "a"), node("ReLU", "b", slope=1), node("Linear", "c", in_features="3", out_features=1.5),
            captured("from_file.default", ("/etc/passwd", True, 3)), captured("exec.default"), outputs=[3],
        )
    )  # fmt: skip
    places = [line.strip().split(": ")[0] for line in message.splitlines()[1:]]
    assert places == [
        "outputs[0]", "nodes[0].layer", "nodes[1].fields.slope", "nodes[2].fields.in_features",
        "nodes[2].fields.out_features", "nodes[3].fields.op", "nodes[4].fields.op",
    ]  # fmt: skip


def test_a_thousand_errors_are_counted_not_listed():
    message = refusal(document(*(node("ReLU", f"n{k}", z=1) for k in range(1000))))
    assert message.endswith("and 900 more")
    assert len(message.splitlines()) == 102


def test_forty_doublings_are_refused_before_anything_of_their_size_is_made():
    nodes = [X] + [node("Concat", f"c{k}", (f"c{k - 1}" if k else "x",) * 2, dim=1) for k in range(40)]
    start = time.perf_counter()
    assert "nodes[30]: gives an axis of 3,221,225,472 positions" in refusal(document(*nodes))
    open_nodes = [{**X, "fields": {}}, *nodes[1:]]
    spec = tfx.from_json(document(*open_nodes)).at((3,))  # sizes that a file leaves open are looked at by whoever says
    for use in (lambda: tfx.couple({}, spec), lambda: str(spec)):
        with pytest.raises(tfx.ShapeError, match="c29 gives an axis"):
            use()
    assert time.perf_counter() - start < 5


def test_labels_have_no_more_room_than_there_is():
    nodes = [X, node("Linear", "c", in_features=3, out_features=2)]
    nodes += [node("Concat", f"c{k}", (f"c{k - 1}" if k else "c",) * 2, dim=1) for k in range(25)]
    spec = tfx.from_json(document(*nodes, node("Reduce", "end", ("c24",), op="sum", dims=[1])))
    params = tfx.init(spec, torch.Generator())
    with pytest.raises(tfx.ShapeError, match="the axes of a network have at most 67,108,864 positions together"):
        tfx.couple(params, spec)
    wide = tfx.serial(tfx.Input((2,)), L.Linear(2, 3), L.Linear(3, 2))
    small = tfx.tree.unflatten((path, torch.empty(shape, device="meta")) for path, shape in wide.shapes.items())
    assert len(tfx.couple(small, wide)) == 3


def test_a_layer_that_fails_on_its_inputs_is_named():
    spec = tfx.Spec((tfx.Node("x", L.Input((3,))), tfx.Node("p", L.Permute((0, 5)), ("x",))))
    with pytest.raises(
        tfx.ShapeError, match=r"p: Permute\(\(0, 5\)\) does not take inputs of shape \(1, 3\) \(IndexError"
    ):
        tfx.couple({}, spec)


# Operators.

REFUSED = (
    "from_file.default", "save.default", "_print.default", "warn.default", "relu_.default", "set_.source_Tensor",
    "add.out", "add.int", "item.default", "resize.default", "_foobar.default", "native_batch_norm.out", "cuda.default",
    "_no_grad_embedding_renorm_.default", "sparse_coo_tensor.indices", "embedding_dense_backward.default",
    "segment_reduce.default", "lu_unpack.default", "_test_warn_in_autograd.default", "record_stream.default",
    "to.device", "get_autocast_dtype.default", "load_library.__globals__.get", "__dict__.__setitem__.__call__",
    "pw.__call__.__call__", "import_module.__call__.__call__", "loaded_libraries.add.__call__", "add.__class__",
    "add", "", "aten.add.Tensor.redispatch", "aten::add.Tensor", "prim.device.default",
    "profiler._record_function_enter.default",
    "prims.resize.default", "prims.copy_to.default", "prims.item.default", "c10d_functional.broadcast.default",
)  # fmt: skip


@pytest.mark.parametrize("op", REFUSED)
def test_an_operator_that_is_no_pure_function_is_refused_where_it_is_read_and_where_it_is_made(op):
    assert refusal(document(X, captured(op))).splitlines()[1].startswith("  nodes[1].fields")
    with pytest.raises(tfx.ShapeError):
        L.Captured(op, (("$", 0),), shape=(1, 3), made=0, given=(0,))


def test_no_operator_that_may_be_named_writes_or_takes_more_than_data():
    """Over all of torch's own: the schema, read here from its text, has no alias that is written to."""
    taken = []
    for schema in torch._C._jit_get_all_schemas():
        space, name = schema.name.split("::")
        if space in ("aten", "prims"):
            try:
                operators.operator(f"{space}.{name}.{schema.overload_name or 'default'}")
            except operators.OperatorError:
                continue
            taken.append(schema)
    assert len(taken) > 1000
    for schema in taken:
        text = str(schema)
        assert "!" not in text, text
        assert "Tensor" in text.rpartition("->")[2], text
        assert not any(word in text.lower() for word in ("storage ", "stream", "filename", "__torch__", "future")), text
    names = {schema.name.split("::")[1] for schema in taken}
    assert names >= {
        "add",
        "where",
        "_softmax",
        "bernoulli",
        "grid_sampler",
        "index_put",
        "_unsafe_view",
        "full",
        "erf",
    }
    assert not any("backward" in name or (name.endswith("_") and not name.endswith("__")) for name in names)


def test_what_operators_may_be_named_run_as_torch_runs_them():
    x = torch.randn(2, 3)
    for op, args, expected in (
        ("add.Tensor", (("$", 0), 2), x + 2),
        ("aten.mul.Tensor", (("$", 0), ("$", 0)), x * x),
        ("to.dtype", (("$", 0), ("dtype", "float64")), x.double()),
        ("full.default", ((("examples", 1), 3), 2.0), torch.full((2, 3), 2.0)),
        ("gelu.default", (("$", 0),), torch.nn.functional.gelu(x)),
    ):
        spec = tfx.from_json(document(X, captured(op, args)))
        assert torch.equal(tfx.apply({}, spec, x), expected)


def test_an_operator_of_another_library_is_read_where_the_program_says_so(tmp_path):
    @torch.library.custom_op("taylorfx_store::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @torch.library.custom_op("taylorfx_store::fill", mutates_args=("x",))
    def fill(x: torch.Tensor) -> None:
        x.fill_(1)

    twice.register_fake(torch.empty_like)
    text = document(X, captured("taylorfx_store.twice.default"))
    message = refusal(text)
    assert "nodes[1].fields.op: 'taylorfx_store.twice.default' is an operator of another library" in message
    assert "operators=['taylorfx_store::twice']" in message
    x = torch.randn(2, 3)
    for names in (["taylorfx_store::twice"], "taylorfx_store::twice", {"a::b", "taylorfx_store::twice"}):
        assert torch.equal(tfx.apply({}, tfx.from_json(text, operators=names), x), 2 * x)
    assert "writes to its arguments" in refusal(
        document(X, captured("taylorfx_store.fill.default")), operators=["taylorfx_store::fill"]
    )
    spec = tfx.from_json(text, operators=["taylorfx_store::twice"])
    tfx.save(tmp_path / "net", {}, spec)
    with pytest.raises(tfx.FileError, match=r"net: .*(?s:.)*operator of another library"):
        tfx.load(tmp_path / "net")
    assert tfx.load(tmp_path / "net", operators=["taylorfx_store::twice"])[1] == spec

    @tfx.interop.rule("taylorfx_store::twice")
    def _(x):
        return None

    assert tfx.load(tmp_path / "net")[1] == spec
    assert "Import the library that registers nobody::knows" in refusal(document(X, captured("nobody.knows.default")))


def test_an_operator_is_compiled_whole():
    spec = tfx.from_json(document(X, captured("add.Tensor", (("$", 0), 2)), outputs=["n"]))
    stored = pickle.dumps(spec)
    operators._OPERATORS.clear()
    spec = pickle.loads(stored)  # as in another process
    run = torch.compile(lambda x: tfx.apply({}, spec, x), fullgraph=True, backend="eager")
    assert torch.equal(run(torch.ones(2, 3)), torch.full((2, 3), 3.0))


def test_a_spec_that_is_no_json_is_not_written():
    spec = tfx.Spec((tfx.Node("x", L.Input((3,))), tfx.Node("r", L.Reduce("sum", torch.Size([1])), ("x",))))
    assert tfx.from_json(tfx.to_json(spec)) == spec
    odd = tfx.Spec((tfx.Node("x", L.Input((3,))), tfx.Node("d", L.Dropout(torch.tensor(0.5)), ("x",))))
    with pytest.raises(tfx.SpecError, match=r"d: p of Dropout \(Object of type Tensor is not JSON"):
        tfx.to_json(odd)


# Mutated documents.

CAPTURED = ("where", "best in space", "last state", "looked up by example")


@functools.cache
def documents():
    """Documents of networks as they are built and as they are captured."""
    found = [tfx.to_json(network(spec).spec) for spec in CONSTRUCTS.values()]
    for name in CAPTURED:
        found.append(tfx.to_json(modules.captured(name)[3]))
    return found


def places(data, path=()):
    """The path of every value in a document."""
    if path:
        yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*path, key))


def value_at(data, path):
    return functools.reduce(lambda value, key: value[key], path, data)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=5),
    st.sampled_from([2**16, 2**31, 2**40, 2**62, 2**63, 10**30, -(2**70), "", "x", "weight", "a.b", ".", "a..b", "$",
                     "dtype", "examples", "int64", "mean", "same", "mul.Tensor", "from_file.default", "relu_.default",
                     "repeat.default", "__metadata__", "Linear", "Concat", "Captured", "LSTM", "Permute",
                     "\ud800", "\0"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


@st.composite
def mutants(draw):
    """A valid document with a few of its values left out, replaced, moved, repeated or renamed."""
    data = json.loads(draw(st.sampled_from(documents())))
    for _ in range(draw(st.integers(1, 3))):
        every = list(places(data))
        path = draw(st.sampled_from(every))
        owner = value_at(data, path[:-1])
        key = path[-1]
        how = draw(st.sampled_from(["replace", "number", "number", "remove", "borrow", "repeat", "rename"]))
        if how == "number" and (numbers := [place for place in every if type(value_at(data, place)) is int]):
            path = draw(st.sampled_from(numbers))
            owner = value_at(data, path[:-1])
            owner[path[-1]] = draw(st.integers(-2, 12) | st.sampled_from([100, 2**10, 2**16, 2**30, 2**40, 2**62]))
        elif how in ("replace", "number"):
            owner[key] = draw(VALUES)
        elif how == "borrow":
            other = draw(st.sampled_from(every))
            owner[key] = copy.deepcopy(value_at(data, other))
        elif how == "repeat" and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif how == "rename" and isinstance(owner, dict):
            owner[draw(st.text(max_size=5))] = owner.pop(key)
        else:
            del owner[key]
    return json.dumps(data)


@settings(deadline=10_000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutants())
def test_a_mutated_document_is_a_network_or_a_file_error(text):
    try:
        spec = tfx.from_json(text)
    except tfx.FileError as error:
        assert len(str(error)) < 200_000
        return
    assert tfx.to_json(tfx.from_json(tfx.to_json(spec))) == tfx.to_json(spec)
    params = tfx.tree.unflatten((path, torch.empty(shape, device="meta")) for path, shape in spec.shapes.items())
    with contextlib.suppress(tfx.SpecError, tfx.ShapeError):
        assert str(spec)
        tfx.couple(params, spec)
    if sum(leaf.numel() for leaf in tfx.tree.flatten(params).values()) < 2**20:
        with contextlib.suppress(tfx.SpecError):
            tfx.init(spec, torch.Generator().manual_seed(0))
