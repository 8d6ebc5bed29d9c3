"""The gate before every fusion: a layer runs fused only if skipping the calls of its children cannot be observed."""

import copy
import gc
from functools import cache

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules import module as registry

import t2t_fast
from t2t_fast import models, reference
from t2t_fast.modules import fusion
from t2t_fast.modules.drop_path import DropPath
from t2t_fast.testing import errors

TINY = dict(img_size=32, num_classes=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0, token_dim=16)


@cache
def _model(make, kind):
    torch.manual_seed(0)
    model = (t2t_fast.T2TViT if make == "own" else reference.T2T_ViT)(tokens_type=kind, **TINY).eval()
    with torch.no_grad():
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            linear.weight.mul_(5)  # otherwise the image would hardly affect the class token
    if make == "swapped":
        t2t_fast.swap(model)
    return model


def upstream(kind="performer"):
    return copy.deepcopy(_model("upstream", kind))


def swapped(kind="performer"):
    return copy.deepcopy(_model("swapped", kind))


def own(kind="performer"):
    return copy.deepcopy(_model("own", kind))


MAKERS = {"swapped": swapped, "own": own}
PARTS = {
    "performer": [
        "norm1", "kqv", "dp", "proj", "norm2", "mlp", "mlp.0", "mlp.1", "mlp.2", "mlp.3",
    ],
    "transformer": [
        "norm1", "attn", "attn.qkv", "attn.attn_drop", "attn.proj", "attn.proj_drop", "drop_path", "norm2", "mlp",
        "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop",
    ],
}  # fmt: skip
SKIPPED = [
    *((kind, f"tokens_to_token.attention1.{part}") for kind, parts in PARTS.items() for part in parts),
    *((kind, f"tokens_to_token.{part}") for kind in PARTS for part in ("soft_split0", "soft_split2", "project")),
    *((kind, path) for kind in PARTS for path in ("tokens_to_token", "tokens_to_token.attention2")),
    ("performer", "blocks.0.attn.attn_drop"),
]
every_child = pytest.mark.parametrize(("kind", "path"), SKIPPED)
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def put(model, path, new):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
    return new


def close(found, expected, bound=1e-5):
    assert errors(found, expected)[0] < bound


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda *_: f()),
    "forward with keywords": lambda m, f: m.register_forward_hook(lambda *_: f(), with_kwargs=True),
    "before": lambda m, f: m.register_forward_pre_hook(lambda *_: f()),
    "backward": lambda m, f: m.register_full_backward_hook(lambda *_: f()),
    "before backward": lambda m, f: m.register_full_backward_pre_hook(lambda *_: f()),
}
GLOBAL = {
    "forward": lambda f: registry.register_module_forward_hook(f),
    "before": lambda f: registry.register_module_forward_pre_hook(f),
    "backward": lambda f: registry.register_module_full_backward_hook(f),
    "before backward": lambda f: registry.register_module_full_backward_pre_hook(f),
}


@every_child
@every_maker
def test_hooks_fire_and_change_nothing(make, kind, path):
    """Each kind of hook on each child fires as often as in upstream's model."""
    models_, x = (make(kind), upstream(kind)), images(1).requires_grad_()
    for name, register in HOOKS.items():
        counts, outs, calls = [], [], []
        for model in models_:
            handle = register(model.get_submodule(path), lambda calls=calls: calls.append(1))
            outs.append(model(x))
            outs[-1].sum().backward()
            counts.append(len(calls))
            handle.remove()
            calls.clear()
        assert counts[0] == counts[1] > 0, name
        close(*outs)
    model(x)
    assert not calls


@pytest.mark.parametrize("name", GLOBAL)
@every_maker
def test_hooks_for_all_modules(make, name):
    """Global hooks are called for the same children, the same number of times, as in upstream's model."""
    seen = []
    for model in (make(), upstream()):
        names, called = {id(module): path for path, module in model.named_modules()}, []
        handle = GLOBAL[name](lambda module, *_, n=names, c=called: c.append(n.get(id(module))))
        try:
            model(images()).sum().backward()
        finally:
            handle.remove()
        seen.append(sorted(called))
    assert seen[0] == seen[1] and "tokens_to_token.attention1.mlp.1" in seen[0]


def _instance(module):
    original = module.forward
    module.forward = lambda x: original(x).abs()


def _accelerated(module):
    """Replace ``forward`` as accelerate's hooks do."""
    original = module.forward
    module._hf_hook, module._old_forward = object(), original
    module.forward = lambda *args, **kwargs: module._old_forward(*args, **kwargs).abs()


def _subclass(module):
    class Absolute(type(module)):
        def forward(self, x):
            return super().forward(x).abs()

    module.__class__ = Absolute


def _called(module):
    class Absolute(type(module)):
        def __call__(self, x):
            return super().__call__(x).abs()

    module.__class__ = Absolute


CHANGES = {"instance": _instance, "accelerate": _accelerated, "subclass": _subclass, "call": _called}
LINEARS = [(kind, path) for kind, path in SKIPPED if path.endswith(("kqv", "qkv", "fc1", "mlp.0", "project"))]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("kind", "path"), [*LINEARS, ("performer", "tokens_to_token.attention1")])
@every_maker
def test_a_changed_forward_is_used(make, kind, path, change):
    """The change happens between two calls, the first of which runs fused."""
    model, twin = make(kind), upstream(kind)
    close(model(images()), twin(images()))
    plain = twin(images())
    for each in (model, twin):
        change(each.get_submodule(path))
    if path.endswith("attention1") and change in (_instance, _accelerated, _called, _subclass):
        # a changed layer receives tokens, as upstream's does, instead of the image
        seen = []
        model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        model(images())
        assert seen == [(2, 64, 147)]
    changed = twin(images())
    assert errors(changed, plain)[0] > 1e-3
    close(model(images()), changed)


WRAPPERS = {
    "sequential": nn.Sequential,
    "checkpoint": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    "path",
    [
        "tokens_to_token.attention1.kqv",
        "tokens_to_token.attention1.mlp",
        "tokens_to_token.attention1",
        "tokens_to_token.soft_split1",
        "tokens_to_token.project",
        "tokens_to_token",
    ],
)
@every_maker
def test_wrapped_children(make, path, wrap):
    model, calls = make(), []
    wrapper = put(model, path, wrap(model.get_submodule(path)))
    wrapper.register_forward_hook(lambda *_: calls.append(1))
    out = model(images())
    assert calls, "the wrapper was never called"
    close(out, upstream()(images()))
    out.sum().backward()
    expected = upstream()
    expected(images()).sum().backward()
    close(model.head.weight.grad, expected.head.weight.grad)
    close(model.cls_token.grad, expected.cls_token.grad, 1e-4)


class LoRA(nn.Module):
    """An adapter around a Linear that exposes the Linear's attributes."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(0.1 * torch.ones(2, linear.in_features))
        self.up = nn.Parameter(0.1 * torch.ones(linear.out_features, 2))
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self):
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize(("kind", "path"), LINEARS)
@every_maker
def test_adapters(make, kind, path):
    outs = []
    for model in (make(kind), upstream(kind)):
        put(model, path, LoRA(model.get_submodule(path)))
        outs.append(model(images()))
    close(*outs)


REPARAMETRISED = {
    "prune": lambda linear: nn.utils.prune.l1_unstructured(linear, "weight", 0.5),
    "old weight norm": lambda linear: nn.utils.weight_norm(linear),
    "old spectral norm": lambda linear: nn.utils.spectral_norm(linear),
    "weight norm": lambda linear: nn.utils.parametrizations.weight_norm(linear),
    "spectral norm": lambda linear: nn.utils.parametrizations.spectral_norm(linear),
    "compiled in place": lambda linear: linear.compile(backend="eager"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", REPARAMETRISED.values(), ids=REPARAMETRISED)
@every_maker
def test_reparametrised_weights(make, change):
    """Also state that a call of the child updates, such as the power iteration of a spectral norm in training."""
    outs, states = [], []
    for model in (make(), upstream()):
        torch.manual_seed(3)
        linear = model.tokens_to_token.attention1.kqv
        change(linear)
        linear.train()
        model(images())
        outs.append(model(images()))
        states.append(linear.state_dict())
    close(*outs)
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value)


@every_maker
def test_identity_in_place_of_dropout_and_norm(make):
    for kind in PARTS:
        outs = []
        for model in (make(kind).train(), upstream(kind).train()):
            for path, module in list(model.named_modules()):
                if isinstance(module, nn.Dropout):
                    put(model, path, nn.Identity())
            outs.append(model(images()))
            assert kind == "transformer" or model is not make or model.tokens_to_token.attention1.obstacle() is None
        close(*outs)
        outs = []
        for model in (make(kind), upstream(kind)):
            put(model, "tokens_to_token.attention1.norm1", nn.Identity())
            outs.append(model(images()))
        close(*outs)


@pytest.mark.parametrize("path", ["dp", "mlp.3"])
@every_maker
def test_one_dropout_in_training_mode(make, path):
    """Monte-Carlo dropout: an eval model with one dropout in training mode, at p=0.5 (fused) and p=1 (unfused)."""
    model = make()
    layer = model.tokens_to_token.attention1
    dropout = layer.get_submodule(path)
    dropout.train()
    dropout.p = 0.5
    assert layer.obstacle() is None
    x = torch.randn(1, 4000, 147)
    first, second = layer(x), layer(x)
    dropout.eval()
    still = layer(x)
    assert not torch.equal(first, second) and errors(first, still)[0] > 1e-3
    torch.testing.assert_close((first - still).mean(), torch.tensor(0.0), atol=0.02, rtol=0)
    dropout.train()
    dropout.p = 1.0
    assert layer.obstacle() == f"{path} drops everything"
    twin = upstream().tokens_to_token.attention1
    twin.get_submodule(path).train().p = 1.0
    close(layer(x), twin(x))


def test_parts_of_a_transformer_layer_that_have_no_fused_form():
    layer = t2t_fast.TokenTransformer(27, 16, drop=0.1, drop_path=0.2, attn_drop=0.3).train()
    assert layer.obstacle() == "mlp.drop is active"
    layer.mlp.drop.eval()
    assert layer.obstacle() == "drop_path is active"
    layer.drop_path.eval()
    assert layer.obstacle() is None  # PyTorch's attention drops weights, the operator drops the projection's output
    assert isinstance(layer.drop_path, DropPath)
    layer.drop_path = nn.Dropout(0.1)
    assert layer.obstacle() == "drop_path is Dropout"


def test_a_wrapped_attention_without_the_originals_attributes():
    """As of an adapter: the layer calls it, though it has neither attn_drop nor scale."""
    layer, x = t2t_fast.TokenTransformer(27, 16).eval(), torch.randn(2, 5, 27)
    expected = layer(x)
    layer.attn = nn.Sequential(layer.attn)
    assert layer.obstacle() == "attn is Sequential"
    torch.testing.assert_close(layer(x), expected)


class GELU(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x)


class Exact(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))


class Stateful(GELU):
    def __init__(self):
        super().__init__()
        self.calls = 0


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("only for images")


ACTIVATIONS = {
    "own, same": (GELU, None),
    "own, by erf": (Exact, None),
    "own, with state": (Stateful, "mlp.1 is Stateful"),
    "own, failing": (Failing, "mlp.1 is Failing"),
    "tanh": (lambda: nn.GELU("tanh"), "mlp.1 is GELU(approximate='tanh')"),
    "relu": (nn.ReLU, "mlp.1 is ReLU"),
    "same name": (type("GELU", (nn.ReLU,), {}), f"mlp.1 is {__name__}.GELU"),
}


@pytest.mark.parametrize(("make", "why"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(make, why):
    layer, twin = t2t_fast.TokenPerformer(27, 16).eval(), reference.Token_performer(27, 16).eval()
    twin.load_state_dict(layer.state_dict())
    layer.mlp[1] = twin.mlp[1] = make()
    assert layer.obstacle() == why
    if make is not Failing:
        close(layer(torch.ones(1, 5, 27)), twin(torch.ones(1, 5, 27)))


def test_a_longer_mlp_and_a_missing_child():
    layer, twin = t2t_fast.TokenPerformer(27, 16).eval(), reference.Token_performer(27, 16).eval()
    twin.load_state_dict(layer.state_dict())
    for each in (layer, twin):
        each.mlp.append(nn.Tanh())
    assert layer.obstacle() == "mlp has the child 4"
    close(layer(torch.ones(1, 5, 27)), twin(torch.ones(1, 5, 27)))
    del layer.mlp
    assert layer.obstacle() == "mlp is missing"


def test_parameters_that_an_operator_cannot_read():
    layer, twin = t2t_fast.TokenTransformer(27, 16).eval(), reference.Token_transformer(27, 16, 1).eval()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(1, 5, 27)
    for each in (layer, twin):  # upstream's layer accepts a bfloat16 model whose norms are float32
        each.to(torch.bfloat16)
        each.norm1.float()
        each.norm2.float()
    assert layer.obstacle() == "attn.qkv.weight is torch.bfloat16, the layer's first parameter torch.float32"
    close(layer(x.bfloat16()).float(), twin(x.bfloat16()).float(), 3e-2)
    layer = t2t_fast.TokenPerformer(27, 16).eval()
    layer.w.data = layer.w.data.double()
    assert layer.obstacle() == "w is torch.float64, the layer's first parameter torch.float32"
    layer.w.data = layer.w.data.float()
    layer.proj.weight = nn.Parameter(layer.proj.weight.detach().to_sparse())
    assert layer.obstacle() == "proj.weight is not dense"
    meta = copy.deepcopy(t2t_fast.TokenPerformer(27, 16)).to("meta")
    assert meta.obstacle() == "norm1.weight is on the meta device"
    assert meta(torch.empty(2, 5, 27, device="meta")).shape == (2, 5, 16)


def test_cached_checks_belong_to_a_class():
    """The cache keeps no module alive, and a copy is checked by itself."""
    layer = t2t_fast.TokenPerformer(27, 16)
    layer.mlp[1] = GELU()
    assert layer.obstacle() is None
    twin = copy.deepcopy(layer)
    twin.kqv.register_forward_hook(lambda *_: None)
    assert layer.obstacle() is None and twin.obstacle() == "kqv has hooks"
    import weakref

    watch = weakref.ref(layer)
    del layer
    gc.collect()
    assert watch() is None and GELU in fusion._known


def test_reports_say_what_runs_unfused():
    model = upstream()
    model.tokens_to_token.attention1.mlp[1] = nn.ReLU()
    model.tokens_to_token.project.register_forward_hook(lambda *_: None)
    report = t2t_fast.swap(model)
    rows = {row.path: row.backend for row in report.rows}
    assert rows["tokens_to_token.attention1"] == "unfused: mlp.1 is ReLU"
    assert rows["tokens_to_token"] == "unfused: project has hooks"
    assert "unfused" not in rows["tokens_to_token.attention2"]
    told = {path: backend for path, _, backend in t2t_fast.explain(model).rows}
    assert told == {path: name for path, name in rows.items() if name}
    assert "unfused: mlp.1 is ReLU" in str(t2t_fast.explain(model))
    assert "no module of t2t_fast" in str(t2t_fast.explain(nn.Linear(2, 2)))


@pytest.mark.parametrize("block", ["plain", "se", "ghost"])
def test_backbone_blocks_call_hooked_or_replaced_children(block):
    """The dropout of attention weights and the ghost block's factors are called if they have hooks or are replaced."""
    torch.manual_seed(0)
    model = models.T2TViT(**{**TINY, "mlp_ratio": 3.0}, block=block).eval()
    expected, calls = model(images()), []
    path = "attn.cheap_operation_q" if block == "ghost" else "attn.attn_drop"
    child = model.blocks[0].get_submodule(path)
    handle = child.register_forward_hook(lambda *_: calls.append(1))
    close(model(images()), expected)
    assert calls
    handle.remove()
    put(model, "blocks.0.attn.attn_drop", nn.Identity())
    put(model, f"blocks.1.{path}", nn.Sequential(model.blocks[1].get_submodule(path)))
    close(model(images()), expected)


def test_attention_maps_can_be_read_and_changed():
    """A hook on the dropout of weights receives softmax weights, and its result is used."""
    for attention in (t2t_fast.models.blocks.Attention(8, num_heads=2), t2t_fast.TokenTransformer(9, 8).attn):
        seen = []
        width = attention.qkv.in_features
        attention.attn_drop.register_forward_hook(lambda m, inputs, out, seen=seen: seen.append(out) or 0 * out)
        out = attention(torch.randn(1, 5, width))
        torch.testing.assert_close(seen[0].sum(-1), torch.ones_like(seen[0].sum(-1)))
        assert out.shape == (1, 5, 8)


class FullyShardedLinear(nn.Linear):
    """Stand-in for FSDP2, which gives a module another class and hooks."""


@every_maker
def test_a_sharded_child(make):
    model, calls = make(), []
    linear = model.tokens_to_token.attention1.kqv
    linear.__class__ = FullyShardedLinear
    assert model.tokens_to_token.attention1.obstacle() is None, "another class alone changes nothing"
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    close(model(images()), upstream()(images()))
    assert calls and model.tokens_to_token.attention1.obstacle() == "kqv has hooks"


def test_stage_maps_call_the_module():
    model, calls = own(), []
    model.tokens_to_token.register_forward_hook(lambda *_: calls.append(1))
    assert [m.shape[-1] for m in model.forward_stages(images())] == [8, 4, 2] and calls


def test_lanl_and_timm_models_call_their_front_end():
    lanl = models.lanl.T2TViT((1, 30, 50), (7, 3, 3), token_len=24, token_chan=16, depth=1).eval()
    patch = models.lanl.ViTModel((1, 40, 60), 20, token_len=24, depth=1).eval()
    embed = t2t_fast.T2TEmbed(32, embed_dim=24, token_dim=16).eval()
    cases = ((lanl, lanl.tokens_to_token, (1, 30, 50)), (patch, patch.patch_tokens, (1, 40, 60)))
    for model, front, shape in (*cases, (embed, embed.tokens_to_token, (3, 32, 32))):
        calls = []
        front.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(torch.randn(1, *shape))
        assert calls == [1]
