"""``cuda_graph``: rejected arguments, calls with stand-in graphs, and agreement with the model on a GPU."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import nn

import t2t_fast
from t2t_fast import reference, testing
from t2t_fast.cuda_graphs import CapturedModel, cuda_graph

X = torch.randn(2, 3, 8, 8)


class PretendGraphs:
    """Stand-in for CUDA graphs: a replay runs the function again and overwrites the first result, as a graph does."""

    def __init__(self):
        self.warmed = 0

    def warm_up(self, run, device, times):
        for _ in range(times):
            run()
            self.warmed += 1

    def record(self, run, device):
        result = run()

        def replay():
            for old, new in zip(tensors(result), tensors(run()), strict=True):
                old.copy_(new)

        return replay, result


def tensors(value):
    """The tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def network():
    """A module with parameters, buffers, dropout, and a child without any of them."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.GELU()).eval()


def pretend(model, x=X):
    return CapturedModel(model, x, 2, PretendGraphs())


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "x", "options", "error", "text"),
        [
            (len, X, {}, TypeError, "cuda_graph: model must be a torch.nn.Module, got builtin_function_or_method"),
            (network(), [1.0], {}, TypeError, "cuda_graph: x must be a torch.Tensor, got list"),
            (network(), X, {"warmup": 0}, ValueError, "cuda_graph: warmup must be an int of at least 1, got 0"),
            (network(), X, {"warmup": 1.5}, ValueError, "cuda_graph: warmup must be an int of at least 1, got 1.5"),
            (network().train(), X, {}, ValueError, "eval mode .*, but the model is in training mode"),
        ],
        ids=["model", "x", "no warm-up", "fractional warm-up", "training"],
    )
    def test_arguments(self, model, x, options, error, text):
        with pytest.raises(error, match=text):
            cuda_graph(model, x, **options)

    def test_the_old_name_warns_and_is_the_same_function(self):
        with pytest.warns(DeprecationWarning, match=r"t2t_fast\.cuda_graph"), pytest.raises(TypeError, match="got int"):
            t2t_fast.capture(3, X)

    def test_one_module_in_training_mode_is_named(self):
        model = network()
        model[2].train()
        with pytest.raises(ValueError, match="but 2 is in training mode"):
            cuda_graph(model, X)

    def test_no_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="cuda_graph: PyTorch finds no CUDA device"):
            cuda_graph(network(), X)

    def test_input_on_a_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match="cuda_graph: x must be on a CUDA device, got cpu"):
            cuda_graph(network(), X)

    @pytest.mark.gpu
    def test_parameter_on_a_cpu(self):
        with pytest.raises(ValueError, match=r"cuda_graph: 0.weight must be on the device of x \(cuda:0\), got cpu"):
            cuda_graph(network(), X.cuda())

    @pytest.mark.parametrize(
        ("x", "text"),
        [
            (X[:1], r"x must be \(2, 3, 8, 8\) float32 on cpu, as captured, got \(1, 3, 8, 8\) float32 on cpu"),
            (X.double(), r"got \(2, 3, 8, 8\) float64 on cpu"),
            (X.to("meta"), r"got \(2, 3, 8, 8\) float32 on meta"),
        ],
        ids=["shape", "dtype", "device"],
    )
    def test_another_input_at_the_call(self, x, text):
        with pytest.raises(ValueError, match=text):
            pretend(network())(x)

    def test_no_tensor_at_the_call(self):
        with pytest.raises(TypeError, match=r"CapturedModel: x must be a torch\.Tensor, got NoneType"):
            pretend(network())(None)

    def test_a_result_of_another_type(self):
        class Odd(nn.Module):
            def forward(self, x):
                return {"tokens": [x, {1, 2}]}

        with pytest.raises(TypeError, match="dictionaries of them, got set"):
            pretend(Odd().eval())


def other_data(model):
    model[0].weight.data = model[0].weight.data.clone()


def other_parameter(model):
    model[0].bias = nn.Parameter(torch.zeros(4))


def no_parameter(model):
    model[0].bias = None


def other_dtype(model):
    model.double()


def other_buffer(model):
    model[1].running_mean = torch.zeros(4)


def other_child(model):
    model[3] = nn.ReLU()


def child_deleted_first(model):
    shape = model[0].weight.shape
    del model[0]
    model.insert(0, nn.Conv2d(shape[1], shape[0], 3))


class TestReplacements:
    @pytest.mark.parametrize(
        ("change", "path"),
        [
            (other_data, "0.weight"),
            (other_parameter, "0.bias"),
            (no_parameter, "0.bias"),
            (other_dtype, "0.weight"),
            (other_buffer, "1.running_mean"),
            (other_child, "3"),
            (child_deleted_first, "0"),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_are_rejected_by_name(self, change, path):
        model = network()
        captured = pretend(model)
        change(model)
        with pytest.raises(RuntimeError, match=rf"CapturedModel: {path} was replaced .* capture the model again"):
            captured(X)

    def test_a_transposed_view_is_a_replacement(self):
        model = nn.Linear(8, 8).eval()
        captured = pretend(model)
        model.weight.data = model.weight.data.T
        with pytest.raises(RuntimeError, match="weight was replaced"):
            captured(X)

    def test_training_mode_is_refused(self):
        model = network()
        captured = pretend(model)
        model.train()
        with pytest.raises(RuntimeError, match="the model is in training mode"):
            captured(X)

    def test_changes_in_place_are_seen(self):
        model, other = network(), network()
        captured = pretend(model)
        model.load_state_dict(other.state_dict())
        assert torch.equal(captured(X), other(X))


class Pair(NamedTuple):
    """A named tuple as result."""

    first: torch.Tensor
    second: list


class TestCalls:
    def test_follows_its_input_and_warms_up(self):
        model, graphs = network(), PretendGraphs()
        captured = CapturedModel(model, X, 3, graphs)
        assert graphs.warmed == 3 and captured.model is model
        for x in (torch.randn_like(X), torch.randn(8, 8, 3, 2).permute(3, 2, 0, 1)):
            out = captured(x.requires_grad_())
            assert torch.equal(out, model(x)) and not out.requires_grad

    def test_the_first_input_is_copied(self):
        x = X.clone()
        captured = pretend(network(), x)
        captured(torch.randn_like(X))
        assert torch.equal(x, X)
        x.zero_()
        assert not torch.equal(captured(X), pretend(network(), x)(x))

    def test_the_result_is_a_copy_by_default(self):
        captured = pretend(network())
        first = captured(X)
        kept, other = first.clone(), torch.randn_like(X)
        captured(other)
        assert torch.equal(first, kept)
        static = captured(X, copy=False)
        assert torch.equal(static, kept) and captured(other, copy=False) is static and not torch.equal(static, kept)

    def test_capture_in_inference_mode_and_call_outside(self):
        model = network()
        with torch.inference_mode():
            captured = pretend(model, X.clone())
            inside, other = captured(X), torch.randn(X.shape)
        outside = captured(other)
        assert not outside.is_inference() and not captured(other, copy=False).requires_grad
        with torch.no_grad():
            assert torch.equal(inside, model(X)) and torch.equal(outside, model(other.clone()))

    def test_results_keep_their_containers(self):
        class Many(nn.Module):
            def forward(self, x):
                return {"pair": Pair(x + 1, [x + 2, None]), "tuple": (x + 3, 4)}

        captured = pretend(Many().eval())
        out = captured(2 * X)
        assert type(out) is dict and type(out["pair"]) is Pair and type(out["pair"].second) is list
        assert torch.equal(out["pair"].first, 2 * X + 1) and torch.equal(out["pair"].second[0], 2 * X + 2)
        assert out["pair"].second[1] is None and torch.equal(out["tuple"][0], 2 * X + 3) and out["tuple"][1] == 4

    def test_autocast_is_that_of_the_capture(self):
        model = nn.Linear(8, 8).eval()
        with torch.autocast("cpu", torch.bfloat16):
            captured = pretend(model)
            model(X)  # leaves the weight in autocast's cache
            model.weight.data.zero_()
            assert torch.equal(captured(X), model.bias.bfloat16().expand(2, 3, 8, 8))
        assert captured(X).dtype == torch.bfloat16
        plain = pretend(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert plain(X).dtype == torch.float32


def swapped():
    model = reference.t2t_vit_7(num_classes=10)
    t2t_fast.swap(model)
    return model.cuda().eval()


def assert_same(value, expected):
    """Equal up to rounding: a library may choose another algorithm for a matrix product."""
    assert testing.errors(value, expected)[0] < (1e-5 if value.dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("batch", [1, 4])
    def test_equals_the_swapped_model(self, batch, dtype):
        model = swapped()
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
            captured = t2t_fast.cuda_graph(model, torch.zeros(batch, 3, 224, 224, device="cuda"))
            for seed in range(3):
                x = testing.natural_images(batch, 3, 224, 224, seed).cuda()
                assert_same(captured(x), model(x))

    def test_sees_a_parameter_change_in_place(self):
        """Folded weights are computed inside the graph."""
        model = swapped()
        x = testing.natural_images(1, 3, 224, 224).cuda()
        with torch.no_grad():
            model(x)
            captured = t2t_fast.cuda_graph(model, x)
            before = captured(x)
            for parameter in model.tokens_to_token.parameters():
                parameter.mul_(1.1)
            after = captured(x)
            assert_same(after, model(x))
            assert testing.errors(before, after)[0] > 1e-2

    def test_refuses_a_replaced_parameter(self):
        model = swapped()
        x = testing.natural_images(1, 3, 224, 224).cuda()
        captured = t2t_fast.cuda_graph(model, x)
        parameter = model.tokens_to_token.attention1.kqv.weight
        parameter.data = parameter.data.clone()
        with pytest.raises(RuntimeError, match=r"tokens_to_token\.attention1\.kqv\.weight was replaced"):
            captured(x)

    def test_two_models_side_by_side(self):
        """Each graph has its own memory."""
        models = [swapped(), swapped()]
        x = testing.natural_images(1, 3, 224, 224).cuda()
        captured = [t2t_fast.cuda_graph(model, x) for model in models]
        other = deepcopy(x).flip(3)
        outs = [each(image) for image in (x, other) for each in captured]
        with torch.no_grad():
            expected = [model(image) for image in (x, other) for model in models]
        for out, wanted in zip(outs, expected, strict=True):
            assert_same(out, wanted)

    def test_a_call_runs_no_operator_of_the_model(self):
        model = swapped()
        x = testing.natural_images(1, 3, 224, 224).cuda()
        captured = t2t_fast.cuda_graph(model, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            captured(x)
        names = {event.key for event in profile.key_averages()}
        assert "aten::copy_" in names and not any("linear" in name or "mm" in name for name in names), names
