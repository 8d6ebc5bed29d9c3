"""soft_split_linear, token_mlp, Performer layer and T2T module in Triton on a GPU: streams, graphs, torch.compile.

Tests whose body needs no GPU also run on the CPU, in Triton's interpreter.
"""

from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import t2t_fast
from support import families, golden, sanitizer
from t2t_fast.ops._common import triton_runtime
from t2t_fast.testing import CASES, errors, tolerance

BLOCK = ("add_layer_norm", "layer_norm_linear", "layer_norm_mlp")
OPERATORS = ("soft_split_linear", "performer_attention", "token_mlp", "performer_layer", *BLOCK)
MODULE = "t2t_module"

# (operator, case); for the module: training (with dropout) or inference
TOKEN_MLP, LAYER = ("token_mlp", "dropout"), ("performer_layer", "dropout")
EVAL, TRAINING = (MODULE, "eval"), (MODULE, "training")
IMAGE, LINEAR, PROJECTION = (
    ("soft_split_linear", name) for name in ("stage1, LayerNorm", "stage2, LayerNorm", "stage2, Linear")
)
BLOCK_MLP = "layer_norm_mlp", "every dropout"
SUBJECTS = [IMAGE, LINEAR, PROJECTION, TOKEN_MLP, LAYER, BLOCK_MLP, EVAL, TRAINING]

interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def each(subjects, interpreted_subjects):
    """Parametrize over subjects: on a GPU in every dtype, and some in float32 on the CPU."""
    found = [
        pytest.param(subject, "cpu", torch.float32, marks=interpreted, id=f"{_words(subject)}-cpu")
        for subject in interpreted_subjects
    ]
    for subject in subjects:
        for name, dtype in DTYPES.items():
            identity = f"{_words(subject)}-cuda-{name}"
            found.append(pytest.param(subject, "cuda", dtype, marks=pytest.mark.gpu, id=identity))
    return pytest.mark.parametrize(("subject", "device", "dtype"), found)


def _words(subject):
    return "-".join(subject).replace(",", "").replace(" ", "_")


@contextmanager
def triton():
    """Triton runs every operator that it implements, or raises."""
    with ExitStack() as stack:
        for op in OPERATORS:
            stack.enter_context(t2t_fast.backend("triton", op))
        yield


class Problem:
    """A subject on a device: ``tensors``, which may be overwritten, and ``run``, which uses their current values."""

    def __init__(self, subject, dtype, device):
        self.op, name = subject
        if self.op == MODULE:
            torch.manual_seed(0)
            module = t2t_fast.T2TModule(32, embed_dim=24, token_dim=16).to(device, dtype)
            self._function = module.train(name == "training")
            self.tensors = {"x": torch.randn(2, 3, 32, 32).to(device, dtype).requires_grad_()}
            leaves = [p for p in module.parameters() if p.requires_grad]
            self.leaves = [self.tensors["x"], *leaves]
        else:
            case = next(case for case in CASES[self.op]() if case.name == name).cast(dtype, device)
            self.tensors = {
                name: t.requires_grad_(name in case.wants_gradient) if t.is_floating_point() else t
                for name, t in case.tensors.items()
            }
            self.leaves = [self.tensors[name] for name in case.wants_gradient]
            self._function = lambda **tensors: case.call(**tensors, **case.options)
        self._shape = None

    def forward(self):
        """The output, after resetting the random seed."""
        torch.manual_seed(1)
        return self._function(**self.tensors)

    def run(self, forward=None):
        """Output and the gradients of all tensors that require one."""
        with triton():
            out = (forward or self.forward)()
            gradient = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
            return [out.detach(), *torch.autograd.grad(out, self.leaves, gradient)]

    def overwrite(self, seed):
        """Write other values into the same memory, and another dropout seed."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.tensors.values():
                if tensor.is_floating_point():
                    tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator) + tensor.cpu().roll(1))
                else:
                    tensor.add_(seed)


def assert_same(found, expected):
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(value, wanted), index


@contextmanager
def late_stream(device):
    """Launches inside run on another stream, after a delay; on the CPU there is no delay."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        yield
    stream.synchronize()


def capture(run, device):
    """Capture ``run``: a function that replays the CUDA graph, and its results; on the CPU a replay calls ``run``."""
    if device == "cpu":
        results = run()

        def again():
            for result, value in zip(results, run(), strict=True):
                result.copy_(value)

        return again, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


@each(SUBJECTS, [LINEAR])
def test_results_repeat_bit_by_bit(subject, device, dtype):
    """Even while another stream keeps the device busy."""
    problem = Problem(subject, dtype, device)
    expected = problem.run()
    assert all(value.isfinite().all() for value in expected)
    if device == "cpu":
        assert_same(problem.run(), expected)
        return
    noise, other = torch.randn(1024, 1024, device=device), torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(other):
            noise = noise @ noise.sigmoid() / 1024
        assert_same(problem.run(), expected)
    other.synchronize()


@each(SUBJECTS, [TOKEN_MLP])
def test_the_current_stream_is_used(subject, device, dtype):
    """A slow stream writes the input first: the result is only right for launches on that stream."""
    problem = Problem(subject, dtype, device)
    expected = problem.run()
    full = {name: t.detach().clone() for name, t in problem.tensors.items()}
    with torch.no_grad():
        for tensor in problem.tensors.values():
            tensor.zero_()
    with late_stream(device):
        with torch.no_grad():
            for name, tensor in problem.tensors.items():
                tensor.copy_(full[name])
        found = problem.run()
    assert_same(found, expected)


# the graph draws the module's dropout seeds from a generator that advances with every replay
GRAPHED = [subject for subject in SUBJECTS if subject != TRAINING]


@each(GRAPHED, [TOKEN_MLP])
def test_graphs(subject, device, dtype):
    """Forward and backward are captured once and replayed with other data."""
    problem = Problem(subject, dtype, device)
    before = [value.clone() for value in problem.run()]
    replay, results = capture(problem.run, device)
    for seed in (1, 2):
        problem.overwrite(seed)
        replay()
        expected = problem.run()
        assert_same(results, expected)
        assert not torch.equal(results[0], before[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_replay_of_a_training_step_draws_other_masks(dtype):
    problem = Problem(TRAINING, dtype, "cuda")
    problem.forward = lambda: problem._function(**problem.tensors)
    replay, results = capture(problem.run, "cuda")
    replay()
    first = [value.clone() for value in results]
    replay()
    assert not torch.equal(results[0], first[0])
    assert all(value.isfinite().all() for value in results)


@each(SUBJECTS, [LINEAR, TRAINING])
def test_activation_checkpointing(subject, device, dtype):
    """Backward runs forward again, with the same masks."""
    problem = Problem(subject, dtype, device)
    names, tensors = zip(*problem.tensors.items(), strict=True)

    def again():
        torch.manual_seed(1)
        return checkpoint(
            lambda *values: problem._function(**dict(zip(names, values, strict=True))), *tensors, use_reentrant=False
        )

    assert_same(problem.run(again), problem.run())


@pytest.mark.slow
@each(SUBJECTS, [LINEAR, TOKEN_MLP, LAYER, BLOCK_MLP])
def test_one_graph_under_compile(subject, device, dtype):
    """With Inductor on a GPU, with aot_eager on the CPU, where the kernels are interpreted."""
    problem = Problem(subject, dtype, device)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(problem._function, backend=backend, fullgraph=True)
    expected = problem.run()

    def forward():
        torch.manual_seed(1)
        return compiled(**problem.tensors)

    found = problem.run(forward)
    if subject == TRAINING:  # Inductor draws its random numbers in another order
        assert all(value.isfinite().all() for value in found)
        return
    assert errors(found[0], expected[0])[0] <= tolerance(problem.op, "forward", dtype)
    for value, wanted in zip(found[1:], expected[1:], strict=True):
        assert errors(value, wanted)[0] <= tolerance(problem.op, "backward", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("subject", SUBJECTS, ids=_words)
def test_the_device_of_the_tensor_is_used(subject):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    expected = Problem(subject, torch.bfloat16, "cuda:0").run()
    with torch.cuda.device(0):
        found = Problem(subject, torch.bfloat16, "cuda:1").run()
        assert torch.cuda.current_device() == 0
    for value, wanted in zip(found, expected, strict=True):
        assert value.device == torch.device("cuda:1")
        if subject != TRAINING:  # its masks come from each device's own generator
            assert torch.equal(value.cpu(), wanted.cpu())


GOLDEN = [
    name
    for name, case in golden.cases().items()
    if case["upstream"] == "official"
    and name.removeprefix("official_").startswith(("t2t_module_p", "t2t_module_t", "token_p", "token_t", "tiny_p"))
]
GOLDEN += [f"official_t2t_vit_{name}" for name in ("7", "14", "t_14", "14_se", "dense", "16_ghost")]
GOLDEN_INTERPRETED = ("official_token_performer_147_64", "official_token_transformer_147_64")

# A multiple of upstream's own float32 error, and the error of whole gradients: as in test_golden.py, plus tf32x3's.
GOLDEN_FACTOR, GOLDEN_BACKWARD = 12, 1e-4


@pytest.mark.parametrize(
    ("name", "device"),
    [pytest.param(name, "cpu", marks=interpreted) for name in GOLDEN_INTERPRETED]
    + [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in GOLDEN],
)
def test_golden_numbers(name, device):
    """Outputs and gradients of the upstream modules and models, in float32."""
    case = golden.cases()[name]
    built, data = families.build(case, "fast"), golden.arrays(case)
    model = golden.fill(built.model, case, built.upstream_key).to(device).eval()
    x = golden.make_input(case, torch.float32).to(device).requires_grad_()
    with triton():
        out = model(x)
    assert np.abs(out.detach().cpu().double().numpy() - data["out"]).max() <= GOLDEN_FACTOR * case["f32_max_abs_err"]
    if "grad_keys" in data:
        golden.loss_of(case, out.cpu()).backward()
        gradients = {built.upstream_key(key): p.grad for key, p in model.named_parameters()}
        gradients["input"] = x.grad
        on_cpu = {key: None if gradient is None else gradient.cpu() for key, gradient in gradients.items()}
        golden.check_gradients(case, data, on_cpu.get, GOLDEN_BACKWARD)


SANITIZED = """
import torch
from t2t_fast.testing import CASES
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for op in ("soft_split_linear", "token_mlp", "performer_layer", "add_layer_norm", "layer_norm_mlp"):
        for case in CASES[op]():
            case.cast(dtype, "cuda").run_backward("triton", dtype)
torch.cuda.synchronize()
print("ran to the end")
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool):
    sanitizer.check(tool, SANITIZED)


@pytest.mark.gpu
def test_sums_of_many_tokens():
    """The tokens of a batch, all positive: a sum in the matrix units would have an error of 5e-4."""
    x, grad = torch.rand(1, 64, 256, 224, device="cuda"), torch.rand(1, 256 * 224, 64, device="cuda")
    weight = torch.zeros(64, 64, device="cuda", requires_grad=True)
    t2t_fast.functional.soft_split_linear(x, weight, None, 1, 1, 0, backend="triton").backward(grad)
    exact = grad[0].double().T @ x[0].flatten(1).double().T
    assert errors(weight.grad, exact)[0] <= tolerance("soft_split_linear", "backward", torch.float32)
