"""What exported graphs contain: folded weights, one convolution per part of a soft split, only the needed tokens."""

import pytest
import torch
from torch import nn

from interop.test_export import TINY, onnx_packages
from t2t_fast import backends, functional, reference
from t2t_fast.interop.export import FORMATS, export_model, simplify
from t2t_fast.interop.export.source import Source
from t2t_fast.interop.export.trace import for_inference, trace
from t2t_fast.interop.swap import swap
from t2t_fast.models import T2TViT
from t2t_fast.testing import CASES, assert_close, natural_images

OPS = [op for op in backends.operators() if backends._tables[op]["aten"].graph is not None]
aten = torch.ops.aten


@pytest.fixture
def graph_forms(monkeypatch):
    """Inside, the backend "aten" runs the graph forms."""
    for op in OPS:
        found = backends.implementation(op, "aten")
        monkeypatch.setitem(backends._tables[op], "aten", found._replace(call=found.graph))


def traced(model, free=False):
    sides = (48, 64) if free else (32, 32)
    with for_inference(model):
        return trace(model, torch.randn(2, 3, *sides), free, free)


def swapped():
    model = reference.T2T_ViT(**TINY)
    swap(model)
    return model


def calls(program):
    return [node for node in program.graph.nodes if node.op == "call_function"]


def test_operators_with_graph_forms():
    assert set(OPS) == {"soft_split_linear", "performer_layer", "token_mlp", "layer_norm_mlp"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_graph_forms_are_within_the_tolerances(graph_forms, op, dtype):
    for case in CASES[op]():
        if dtype == torch.bfloat16 and case.name.startswith("large kernel"):
            continue  # at the tolerance: its kernel of differences has rounded sums of 961 weights
        rounded = case.cast(dtype)
        expected = rounded.cast(torch.float64).run("reference")
        assert_close(rounded.run("aten"), expected, op, "forward", dtype, case.name)


@pytest.mark.parametrize(("offset", "contrast"), [(0.0, 1e-2), (2.5, 1e-2), (2.5, 1e-3), (250.0, 1.0)])
@torch.no_grad()
def test_bright_flat_images(graph_forms, offset, contrast):
    x = (natural_images(2, 3, 32, 40) * contrast + offset).float()
    x[:, :, :16] = x[:1, :, :1, :1]  # flat
    weight = torch.randn(24, 147) * 0.1
    norm = {"norm_weight": torch.rand(147) + 0.5, "norm_bias": torch.randn(147)}
    options = {"kernel_size": 7, "stride": 4, "padding": 0, "norm_eps": 1e-5}
    found = functional.soft_split_linear(x, weight, **norm, **options, backend="aten")
    wide = {name: each.double() for name, each in norm.items()}
    exact = functional.soft_split_linear(x.double(), weight.double(), **wide, **options, backend="reference")
    assert_close(found, exact, "soft_split_linear", "forward", torch.float32, f"{offset} {contrast}")


@torch.no_grad()
def test_images_of_bytes(graph_forms):
    x = torch.randint(0, 256, (2, 3, 16, 20), dtype=torch.uint8)
    options = {"kernel_size": 7, "stride": 4, "padding": 2, "pixel_norm": ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))}
    weight = torch.randn(8, 147)
    for norm_eps in (None, 1e-5):
        found = functional.soft_split_linear(x, weight, norm_eps=norm_eps, **options, backend="aten")
        exact = functional.soft_split_linear(x, weight, norm_eps=norm_eps, **options, backend="reference")
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dropout_is_that_of_the_aten_form(graph_forms):
    case = next(case for case in CASES["token_mlp"]() if case.options["proj_drop"])
    found = case.run("aten")
    torch.testing.assert_close(found, case.run("reference"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, type(case)(**{**vars(case), "options": {}}).run("aten"))


@pytest.mark.parametrize("kind", ["swapped", "created", pytest.param("free", marks=pytest.mark.slow)])
def test_everything_that_depends_on_weights_alone_is_a_constant(kind):
    program = traced(swapped() if kind == "swapped" else T2TViT(**TINY), kind == "free")
    image = program.graph_signature.user_inputs[0]
    known = {node for node in program.graph.nodes if node.op == "placeholder" and node.name != image}
    for node in calls(program):
        if node.all_input_nodes and known.issuperset(node.all_input_nodes):
            assert node.target in simplify.VIEWS, node.format_node()
            known.add(node)
    # convolutions: the differences, two of the statistics, k, q and v; the latter five; the projection
    names = [str(node.target) for node in calls(program)]
    assert names.count("aten.conv2d.default") == 12
    assert not {"aten.im2col.default", "aten.unfold.default", "aten.index.Tensor", "aten.gather.default"} & set(names)
    values = [node.meta["val"] for node in calls(program) if node not in known]
    values = [value for value in values if isinstance(value, torch.Tensor)]
    assert {value.dtype for value in values} == {torch.float32}
    # no tensor has an unfolded width: 147, 16 * 9
    assert not {147, 144} & {size for value in values for size in value.shape if isinstance(size, int)}
    # what was folded is not in the file as well
    assert not any("norm1.weight" in name and "attention" in name for name in program.state_dict)
    program.validate()


@pytest.mark.parametrize("free", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fixed", "free"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_only_the_needed_tokens(free, pool):
    model = T2TViT(**{**TINY, "depth": 2}, global_pool=pool)
    program = traced(model, free)
    found = [str(node.meta["val"].shape[2]) for node in calls(program) if "scaled_dot" in str(node.target)]
    assert len(found) == 2 and found[0] != "1" and (found[1] == "1") == (pool == "token")
    x = torch.randn(2, 3, *((37, 50) if free else (32, 32)))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["se", "ghost"])
def test_blocks_that_mix_tokens_elsewhere(block):
    model = T2TViT(**{**TINY, "embed_dim": 48}, block=block)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(traced(model).module()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """Takes some of its tokens at the end, by ``part``."""

    img_size = (4, 6)

    def __init__(self, part, twice=False):
        super().__init__()
        self.layer, self.part, self.twice = nn.Linear(6, 8), part, twice

    def forward(self, x):
        x = nn.functional.gelu(self.layer(x.flatten(1, 2))).transpose(1, 2).transpose(1, 2) + 1
        return (x[:, self.part], x) if self.twice else x[:, self.part]


@pytest.mark.parametrize(
    ("part", "twice", "length"),
    [
        (0, False, 1),
        (3, False, 1),
        (slice(2, 5), False, 3),
        (slice(1, None), False, 12),
        (-1, False, 12),
        (0, True, 12),
    ],
)
def test_parts_of_the_tokens(part, twice, length):
    model = Tokens(part, twice)
    x = torch.randn(2, 3, 4, 6)
    with for_inference(model):
        program = trace(model, x, False)
        for got, expected in zip(*([y] if not twice else y for y in (program.module()(x), model(x))), strict=True):
            torch.testing.assert_close(got, expected)
    linear = next(node for node in calls(program) if node.target is aten.linear.default)
    assert linear.meta["val"].shape[1] == length


@pytest.mark.slow
def test_plain_onnx_without_gathers(tmp_path):
    onnx_packages()
    from onnx import TensorProto

    graph = Source(traced(swapped()), 20, []).onnx.graph
    derived = {"image"}
    for node in graph.node:
        if derived & set(node.input):
            derived |= set(node.output)
        else:
            assert node.op_type in ("Reshape", "Transpose", "Expand", "Constant"), node.op_type
    nodes = [node.op_type for node in graph.node]
    assert nodes.count("Gather") <= 1  # of the class token
    assert not {"GatherND", "GatherElements", "ScatterND", "Im2Col", "Where", "IsNaN", "IsInf"} & set(nodes)
    assert TensorProto.DOUBLE not in {each.data_type for each in graph.initializer}


@pytest.mark.slow
def test_openvino_of_any_batch_and_size(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = T2TViT(**TINY)
    free, fixed = (
        export_model(model, tmp_path, name=name, formats="openvino", dynamic_batch=free, dynamic_size=free).files[0]
        for name, free in (("free", True), ("fixed", False))
    )
    run = FORMATS["openvino"].runner(free.path)
    for batch, *sides in [(1, 19, 19), (3, 33, 32), (2, 64, 50), (1, 48, 112)]:
        x = torch.randn(batch, 3, *sides)
        with torch.no_grad():
            torch.testing.assert_close(run(x)[0], model.eval()(x), rtol=1e-4, atol=1e-5)
    # a size that is not free is fixed in the file, and a free one can be fixed later
    core = openvino.Core()
    assert list(core.read_model(fixed.path).inputs[0].shape) == [1, 3, 32, 32]
    read = core.read_model(free.path)
    assert read.inputs[0].partial_shape.is_dynamic
    read.reshape([2, 3, 40, 56])
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), model(x), rtol=1e-4, atol=1e-5)
