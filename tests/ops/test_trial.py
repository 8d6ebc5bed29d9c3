"""The self-test of Triton kernels at their first run: which kernels are tried, and which results are recorded."""

import threading
from contextlib import nullcontext

import pytest
import torch

from t2t_fast import backends
from t2t_fast.backends import Request
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.spec import Window, square
from t2t_fast.ops.performer_attention.triton import support as attention
from t2t_fast.ops.performer_layer.triton import support as layer
from t2t_fast.ops.soft_split_linear.triton import support as split
from t2t_fast.ops.token_mlp.triton import support as mlp

REASON = triton_runtime.reason(Request("cpu", torch.float32, {}))
pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.self_test,
    pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}"),
]

ALL_KERNELS = {
    "performer_attention": ("forward", "backward", "chunked"),
    "soft_split_linear": ("forward", "image_gradient", "weight_gradient"),
    "token_mlp": ("forward", "backward"),
    "performer_layer": ("forward",),
}


# ---- which kernels are tried


class Launched:
    """Records each launch of a kernel: its arguments by name."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            names = [p for p in self.kernel.arg_names if p not in constants]
            self.launches.append((self.name, dict(zip(names, arguments, strict=False)) | constants))
            return self.kernel[grid](*arguments, **constants)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Every launch, (kernel's name, arguments), in order."""
    from importlib import import_module

    found = []
    for op, modules in ALL_KERNELS.items():
        for module in modules:
            module = import_module(f"t2t_fast.ops.{op}.triton.{module}")
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Launched(getattr(module, name), name, found))
    return found


AMP = {"image": torch.float32, "w": torch.float32, "parameters": torch.float32}
IMAGE = {"channels": 3, "window": square(7, 4, 2)}
TOKENS = {"channels": 16, "window": square(3, 2, 1)}


def layer_request(dtype, **sizes):
    return Request("cpu", dtype, {"width": 16, "features": 8, "hidden": 16, "outputs": 48, "dropout": False, **sizes})


def test_inference_of_a_layer_tries_two_launches(launches):
    """In inference neither the single passes nor backward kernels of a fused layer are tried; an image is in cells."""
    assert layer.supports(layer_request(torch.float16, **IMAGE, **AMP)) is None
    expected = {"cells_kernel", "split_keys_kernel", "read_out_mlp_kernel", "merge_kernel"}
    assert {name for name, _ in launches} == expected
    projections = [found for name, found in launches if name == "split_keys_kernel"]
    assert not any(found["WHOLE"] for found in projections)
    cells = [found for name, found in launches if name == "cells_kernel"]
    assert {found["x"].dtype for found in cells} == {torch.float32}
    assert {found["SHIFT"] for found in projections} == {True}


@pytest.mark.parametrize("image_gradient", [False, True])
def test_training_of_a_layer_tries_its_backward(launches, image_gradient):
    sizes = {**TOKENS, **AMP, "image": torch.bfloat16}
    assert layer.supports(layer_request(torch.bfloat16, training=True, image_gradient=image_gradient, **sizes)) is None
    names = {name for name, _ in launches}
    assert {"token_mlp_backward_kernel", "queries_backward_kernel", "keys_backward_kernel"} < names
    assert "split_linear_weight_kernel" in names and "split_linear_kernel" not in names
    assert ("split_linear_image_kernel" in names) == image_gradient
    assert all(found["WHOLE"] for name, found in launches if name == "split_keys_kernel")
    backward = [found for name, found in launches if name in ("queries_backward_kernel", "keys_backward_kernel")]
    assert all(found["d_w"] is None for found in backward)  # not requested
    keys = next(found for name, found in launches if name == "keys_backward_kernel")
    assert keys["k"][0].dtype == torch.bfloat16 and keys["w"][0].dtype == torch.float32
    assert keys["k"][3] == keys["v"][3] == 3 * 16  # views of one packed tensor


def test_low_memory_computes_kqv_again(launches):
    assert layer.supports(layer_request(torch.float32, training=True, recompute=True, **TOKENS)) is None
    assert "split_linear_kernel" in {name for name, _ in launches}
    assert not any(found["WHOLE"] for name, found in launches if name == "split_keys_kernel")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_tried_with_amp_dtypes(launches, masked):
    sizes = {"width": 16, "features": 8, "masked": masked, "w": torch.float32}
    assert attention.supports(Request("cpu", torch.float16, sizes)) is None
    assert {name for name, _ in launches} <= {"keys_kernel", "queries_kernel", "merge_kernel"}
    keys = launches[0][1]
    assert keys["k"][0].dtype == torch.float16 and keys["w"][0].dtype == torch.float32
    assert keys["k"][3] == 3 * 16 and (keys["mask"] is not None) == masked


@pytest.mark.parametrize("dtype", triton_runtime.DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 17])
def test_one_feature_passes(width, dtype):
    """The gradient of q is then only rounding."""
    sizes = {"width": width, "features": 1, "training": True, "w_gradient": True}
    assert attention.supports(Request("cpu", dtype, sizes)) is None


@pytest.mark.parametrize(("training", "dropout"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_mlp_is_tried_as_it_runs(launches, training, dropout):
    sizes = {"width": 16, "hidden": 16, "training": training, "dropout": dropout, "parameters": torch.float32}
    assert mlp.supports(Request("cpu", torch.bfloat16, sizes)) is None
    names = {name for name, _ in launches}
    assert names == ({"token_mlp_kernel", "token_mlp_backward_kernel"} if training else {"token_mlp_kernel"})
    found = launches[0][1]
    assert (found["seed"] is not None) == dropout
    assert found["mlp"].proj_weight.dtype == torch.float32 and found["y"][0].dtype == torch.bfloat16


def test_bytes_are_tried_as_bytes(launches):
    sizes = {**IMAGE, "outputs": 20, "bytes": True}
    assert split.supports(Request("cpu", torch.float16, sizes)) is None
    assert {found["BYTES"] for name, found in launches if name == "cells_kernel"} == {True}


def test_unspecified_dtypes_follow_autocast():
    """AMP leaves images, parameters and w in float32 unless the caller specifies their dtypes."""
    request = Request("cpu", torch.bfloat16, {"width": 16})
    assert [module.kind(request)[0] for module in (attention, split, mlp)] == 3 * [torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        assert [module.kind(request)[0] for module in (attention, split, mlp)] == 3 * [torch.float32]
        told = Request("cpu", torch.bfloat16, {"width": 16, "w": torch.bfloat16})
        assert attention.kind(told)[0] == torch.bfloat16


FEW_VALUES = [(1, square(1, 1, 0)), (2, square(1, 1, 0)), (1, Window((1, 2), (1, 1), (0, 0))), (3, square(1, 1, 0))]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("channels", "window"), FEW_VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_windows_of_few_values_pass(dtype, channels, window, normed):
    """LayerNorm of one value is 0, of two +-1: the gradients are 0, so no error can be relative to them."""
    sizes = {"channels": channels, "window": window, "outputs": 8, "normed": normed, "training": True}
    assert split.supports(Request("cpu", dtype, sizes)) is None
    if dtype != torch.float32:
        assert split.supports(Request("cpu", dtype, {**sizes, "image": torch.float32})) is None


OTHER_SIZES = [
    *(
        (attention, {"width": width, "features": features, "masked": features % 3 == 0, "w_gradient": True})
        for width, features in [(16, 8), (32, 16), (64, 48), (96, 40), (128, 128), (256, 16), (7, 100), (16, 300)]
    ),
    *(
        (split, {"channels": channels, "window": square(*window), "outputs": outputs, "normed": outputs != 64})
        for channels, window, outputs in [
            (16, (3, 2, 1), 20),
            (5, (3, 1, 0), 64),
            (32, (3, 2, 1), 130),
            (3, (7, 4, 2), 20),
            (1, (9, 5, 2), 7),
            (16, (2, 3, 0), 64),
            (1, (21, 12, 5), 8),
        ]
    ),
    *((mlp, {"width": width, "hidden": hidden}) for width, hidden in [(20, 60), (60, 20), (7, 1), (128, 128)]),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", triton_runtime.DTYPES)
@pytest.mark.parametrize(("module", "sizes"), OTHER_SIZES)
def test_other_sizes_pass(module, sizes, dtype):
    """The self-test accepts right kernels at every kind of size; other tests skip it."""
    assert module.supports(Request("cpu", dtype, {**sizes, "training": True, "dropout": True})) is None


@pytest.mark.parametrize("channels", [2, 16])
@pytest.mark.parametrize("wrong", ["image", "weight"])
def test_wrong_gradients_do_not_pass(wrong, channels, monkeypatch):
    """Where a gradient nearly cancels, an error of the size of the cancelling terms is detected."""
    original = split.run_backward

    def run_backward(grad, x, *rest):
        d_x, d_weight, *others = original(grad, x, *rest)
        return (d_x + x, d_weight, *others) if wrong == "image" else (d_x, 2 * d_weight, *others)

    monkeypatch.setattr(split, "run_backward", run_backward)
    sizes = {"channels": channels, "window": square(1, 1, 0), "outputs": 8, "training": True}
    with pytest.warns(RuntimeWarning, match="soft_split_linear leaves its Triton kernel"):
        assert "self-test on cpu gave an error" in split.supports(Request("cpu", torch.float32, sizes))


# ---- which results are recorded


@pytest.fixture
def cuda(monkeypatch):
    """A fake CUDA device; tensors stay on the CPU. Returns the list of actions that ``synchronize`` runs."""
    actions = []

    def synchronize(device):
        for action in actions:
            action()

    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device: (9, 0),
        "device": lambda device: nullcontext(),
        "synchronize": synchronize,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **named: nullcontext())
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    return actions


def ones(*call):
    return [torch.ones(3)]


def fail(error):
    def action(*call):
        raise error

    return action


@pytest.mark.usefixtures("cuda")
def test_success_is_remembered():
    assert triton_runtime.trial("op", ones, ones, None, torch.float32, 5) is None
    assert triton_runtime.trial("op", fail(AssertionError("again")), ones, 0, torch.float32, 5) is None


def test_asynchronous_kernel_error(cuda):
    """The error is raised by the synchronisation after the launch; the trial catches and reports it."""
    cuda.append(fail(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.warns(RuntimeWarning, match="illegal memory access"):
        found = triton_runtime.trial("op", ones, ones, 0, torch.float32)
    assert found == "its first run failed with RuntimeError: CUDA error: an illegal memory access was encountered"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
@pytest.mark.parametrize("where", ["run", "synchronize", "expected"])
def test_out_of_memory_raises_and_is_not_recorded(where, error, cuda, recwarn):
    run, expected = fail(error) if where == "run" else ones, fail(error) if where == "expected" else ones
    if where == "synchronize":
        cuda.append(fail(error))
    with pytest.raises(type(error), match="out of memory"):
        triton_runtime.trial("op", run, expected, 0, torch.float32)
    cuda.clear()
    assert triton_runtime.trial("op", ones, ones, 0, torch.float32) is None
    assert not recwarn


@pytest.mark.usefixtures("cuda")
def test_out_of_resources_is_recorded():
    errors = pytest.importorskip("triton.runtime.errors")
    error = errors.OutOfResources(200_000, 101_376, "shared memory")
    with pytest.warns(RuntimeWarning, match="shared memory"):
        assert "OutOfResources" in triton_runtime.trial("op", fail(error), ones, 0, torch.float32)


@pytest.mark.usefixtures("cuda")
def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_runtime.trial("op", fail(AssertionError("tried")), ones, 0, torch.float32) is None
    assert triton_runtime._trials == {}


def test_tf32_and_three_products_are_different_kernels(monkeypatch):
    tried = []
    for allowed in (False, True, False):
        monkeypatch.setattr(triton_runtime, "allows_tf32", lambda allowed=allowed: allowed)
        triton_runtime.trial("op", lambda *call: tried.append(call) or ones(), ones, None, torch.float32)
    assert len(tried) == 2


def test_threads_try_once():
    """As with DataParallel's replicas: one thread runs the trial, the others wait for its result."""
    tried, found, start = [], [], threading.Barrier(6)

    def run(*call):
        tried.append(threading.get_ident())
        threading.Event().wait(0.1)
        return [torch.zeros(3)]

    def ask():
        start.wait()
        found.append(triton_runtime.trial("op", run, ones, None, torch.float32))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    with pytest.warns(RuntimeWarning, match="gave an error of 1.0e\\+00") as caught:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(tried) == 1 and len(found) == 6 and len(set(found)) == 1 and found[0] is not None
    assert len([each for each in caught if each.category is RuntimeWarning]) == 1


def test_a_trial_inside_a_trial():
    """The trial of a layer also tries its launches of two steps."""

    def run(*call):
        assert triton_runtime.trial("inner", ones, ones, None, torch.float32) is None
        return ones()

    assert triton_runtime.trial("outer", run, ones, None, torch.float32) is None
    assert len(triton_runtime._trials) == 2


def test_a_failure_names_its_rank(monkeypatch):
    """Each rank decides for itself; the warning names the rank and says how to select a backend for all ranks."""
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 8)
    for name in ("all_reduce", "broadcast", "barrier", "all_gather_object"):
        monkeypatch.setattr(distributed, name, fail(AssertionError("a collective may wait for ever")))
    words = r"leaves its Triton kernel: .* \(rank 3 of 8; .* T2T_FAST_BACKEND or t2t_fast.backend\)"
    with pytest.warns(RuntimeWarning, match=words):
        verdict = triton_runtime.trial("op", fail(RuntimeError("no")), ones, None, torch.float32)
    assert "rank" not in verdict


def test_crowded_is_thread_local(monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(triton_runtime, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(triton_runtime, "multiprocessors", lambda device: 132)
    found = []
    with triton_runtime.crowded():
        thread = threading.Thread(target=lambda: found.append(triton_runtime.section("cuda", 1)))
        thread.start()
        thread.join()
        assert triton_runtime.section("cuda", 1) == "sm_90"
    assert found == ["sm_90-few"]


def test_requests_without_sizes_use_t2t_sizes():
    """A request without sizes is answered for those of T2T-ViT."""
    for op in ("soft_split_linear", "performer_attention", "token_mlp", "performer_layer"):
        assert backends.reason(op, "triton", Request("cpu", torch.float32, {})) is None
