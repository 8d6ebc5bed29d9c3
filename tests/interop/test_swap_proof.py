"""What swap proves, what it refuses, and what of the original module stays reachable."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import t2t_fast
from t2t_fast import reference
from t2t_fast.errors import NothingToSwap
from t2t_fast.interop.swap import swap, unswap
from t2t_fast.models.family import SOFT_SPLITS as SPLITS
from t2t_fast.modules import T2TModule, TokenPerformer, TokenTransformer, Unfold
from t2t_fast.testing import errors

LAYERS = ["attention1", "attention2"]


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def module(kind="performer", cls=reference.T2T_module):
    torch.manual_seed(0)
    return cls(32, kind, 3, 24, 16).eval()


def layer(cls=reference.Token_performer, *args):
    torch.manual_seed(0)
    return cls(27, 16, *args).eval()


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return (
        [each for item in value for each in flat(item)] if isinstance(value, (tuple, list, type({}.values()))) else []
    )


def same(found, expected):
    """Equal structure and sizes, close tensors."""
    assert type(found) is type(expected)
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert ours.shape == theirs.shape and errors(ours, theirs)[0] < 1e-5


# ---- modules that return more than tokens


class Saliency(reference.T2T_module):
    """As VST and M3Net return their stages: tokens of 1/16, 1/8 and 1/4."""

    def forward(self, x):
        quarter = self.attention1(self.soft_split0(x).transpose(1, 2))
        eighth = self.attention2(self.soft_split1(self.restructurize(quarter)).transpose(1, 2))
        return self.project(self.soft_split2(self.restructurize(eighth)).transpose(1, 2)), eighth, quarter


class Pyramid(Saliency):
    """A dictionary of maps and tokens."""

    def forward(self, x):
        tokens, eighth, quarter = super().forward(x)
        return {"tokens": tokens, "maps": [self.restructurize(quarter), self.restructurize(eighth)], "mask": None}


class WithSize(reference.T2T_module):
    """As mmpretrain's returns tokens and their grid."""

    def forward(self, x):
        tokens = super().forward(x)
        side = int(tokens.shape[1] ** 0.5)
        return tokens, (side, side)


class WithInput(reference.T2T_module):
    def forward(self, x):
        return super().forward(x), x.shape, x


@pytest.mark.parametrize("kind", ["performer", "transformer"])
@pytest.mark.parametrize(
    ("cls", "returns"),
    [
        (Saliency, "tuple of tokens 3, tokens 2, tokens 1"),
        (Pyramid, "dict of tokens: tokens 3, maps: list of image 1, image 2, mask: none"),
        (WithSize, "tuple of tokens 3, grid 3"),
        (WithInput, "tuple of tokens 3, input size, input"),
    ],
)
def test_modules_that_return_their_stages(kind, cls, returns):
    model = module(kind, cls)
    expected = model(images())
    report = swap(model)
    assert report.swapped == ["", *LAYERS] and not report.left
    assert f"returns a {returns}" in str(report)
    found = model(images())
    same(found, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(twin(images()), expected)
    assert [row.path for row in report.rows if row.target == "(fused)"] == list(SPLITS)
    assert model.forward_with_grid(images())[1] == (2, 2), "the fast form's own methods return what they say"
    unswap(model)
    assert type(model) is cls


class Summary(reference.T2T_module):
    """Returns something that is none of its stages, and a size that follows from none."""

    def forward(self, x):
        tokens = super().forward(x)
        return tokens, tokens.mean(1)


class Constant(reference.T2T_module):
    def forward(self, x):
        return super().forward(x), (2, 2)


class Viewing(reference.T2T_module):
    """Views what its soft splits return, so that their strides matter."""

    def forward(self, x):
        tokens = super().forward(x)
        return tokens, self.soft_split0(x).view(x.shape[0], 3, -1).sum(-1)


@pytest.mark.parametrize(
    ("cls", "reason", "splits"),
    [
        (Summary, "returns a tensor (2, 24) that is none of its stages", SPLITS),
        (Constant, "the sizes that it returns do not follow from its stages", SPLITS),
        (Viewing, "returns a tensor (2, 3) that is none of its stages", ()),
    ],
)
def test_the_parts_of_a_module_that_stays(cls, reason, splits):
    """Its layers, and its soft splits where the module itself was proved to take their strides."""
    model = nn.ModuleDict({"t": module(cls=cls)})
    expected = model["t"](images())
    report = swap(model)
    assert reason in report.left["t"] and type(model["t"]) is cls
    assert report.swapped == [f"t.{name}" for name in (*splits, *LAYERS)]
    assert all(isinstance(getattr(model["t"], name), Unfold) for name in splits)
    same(model["t"](images()), expected)
    unswap(model)
    assert all(type(getattr(model["t"], name)) is nn.Unfold for name in SPLITS)


# ---- what the fast form would leave out


class Gate(reference.T2T_module):
    """A gate that is 0 before training."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x) * (1 + self.gate)


class Statistics(reference.T2T_module):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("running_mean", torch.zeros(24))

    def forward(self, x):
        return super().forward(x) - self.running_mean


class Scaled(reference.Token_performer):
    """LayerScale as a child, 1 at first."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Linear(1, 1)

    def forward(self, x):
        return super().forward(x) * self.scale.weight.squeeze()


class Switch(reference.Token_performer):
    """A flag of the instance, off at first."""

    def __init__(self, *args):
        super().__init__(*args)
        self.double = False

    def forward(self, x):
        return super().forward(x) * (2 if self.double else 1)


class ClassSwitch(reference.Token_performer):
    double = False

    def forward(self, x):
        return self.finish(super().forward(x))

    def finish(self, x):
        return sum(2 * x if self.double else x for _ in range(1))


class Maps(reference.Token_performer):
    """Keeps what passes, for somebody to read."""

    def forward(self, x):
        y = super().forward(x)
        self.last = y
        return y


class Optional(reference.Token_performer):
    def forward(self, x, mask=None):
        return super().forward(x)


class Own(reference.Token_performer):
    def obstacle(self):
        return "its own"


class Detached(reference.Token_performer):
    def forward(self, x):
        return super().forward(x).detach() + 0 * super().forward(x)


class Undecided(reference.Token_performer):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class TrainsOtherwise(reference.Token_performer):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if self.training else y


class FunctionalDropout(reference.Token_performer):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Cuda(reference.Token_performer):
    def forward(self, x):
        return super().forward(x.cuda())


class Raising(reference.Token_performer):
    def forward(self, x):
        raise KeyError("no such input")


class Property(reference.Token_performer):
    @property
    def kqv(self):
        raise RuntimeError("not ready")


REFUSED = {
    Scaled: "has the child scale, which the fast form does not call",
    Switch: "its forward reads double, which the fast form does not",
    ClassSwitch: "its forward reads double, which the fast form does not",
    Maps: "its forward stores last, which the fast form does not",
    Optional: "its forward takes (x, mask=None), the fast one an input alone",
    Own: "it defines obstacle, which the fast form defines too",
    Detached: "in eval mode the gradient of its input",
    Undecided: "in eval mode its result has no gradient",
    TrainsOtherwise: "in training mode its result",
    FunctionalDropout: "in training mode its result",
    Cuda: "the original does not run on a probe of 2 x 7 x 27",
    Raising: "the original does not run on a probe of 2 x 7 x 27 (KeyError: 'no such input')",
}


@pytest.mark.parametrize(("cls", "reason"), REFUSED.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_what_a_layer_would_lose(cls, reason):
    model = nn.ModuleDict({"l": layer(cls), "plain": layer()})
    report = swap(model)
    assert reason in report.left["l"] and type(model["l"]) is cls and report.swapped == ["plain"]


@pytest.mark.parametrize(("cls", "name"), [(Gate, "gate"), (Statistics, "running_mean")])
def test_what_a_module_would_lose(cls, name):
    model = nn.ModuleDict({"t": module(cls=cls)})
    report = swap(model)
    assert report.left["t"] == f"{cls.__name__} has {name}, which the fast form does not have"
    assert report.swapped == [f"t.{part}" for part in (*SPLITS, *LAYERS)]
    getattr(model["t"], name).data.fill_(0.5)
    twin = copy.deepcopy(model)
    unswap(twin)
    same(model["t"](images()), twin["t"](images()))


def test_a_module_that_cannot_be_examined_is_left():
    broken = layer()
    broken.__class__ = Property
    model = nn.ModuleDict({"broken": broken, "plain": layer()})
    report = swap(model)
    assert "could not be examined: RuntimeError: not ready" in report.left["broken"] and report.swapped == ["plain"]


def test_a_forward_patched_on_the_instance_is_left():
    """Its closure holds the original module, whose class must not change."""
    model = module()
    original = model.attention1.forward
    model.attention1.forward = lambda x: original(x).clamp(-1, 1)
    expected = model(images())
    report = swap(model)
    assert "forward is replaced on the instance" in report.left["attention1"]
    assert type(model.attention1) is reference.Token_performer
    same(model(images()), expected)
    # the proof of the module itself cannot have a copy of that layer either
    assert "attention1.forward is replaced on the instance" in report.left[""]


# ---- what stays reachable


class Named(reference.T2T_module):
    """An extra method, a class attribute, a property, and another name for the input."""

    family = "T2T"

    def forward(self, image):
        return super().forward(image)

    def halves(self, x):
        return self.attention1(self.soft_split0(x).transpose(1, 2)).chunk(2, dim=1)

    @property
    def stride(self):
        return 16

    @classmethod
    def tiny(cls):
        return cls(32, "performer", 3, 24, 16)


def test_methods_and_attributes_stay():
    model = module(cls=Named)
    expected, halves = model(images()), model.halves(images())
    report = swap(model)
    assert report.swapped == ["", *LAYERS]
    assert isinstance(model, Named) and isinstance(model, T2TModule) and isinstance(model, reference.T2T_module)
    assert model.family == "T2T" and model.stride == 16 and model.num_patches == 4 and model.tokens_type == "performer"
    same(model(images()), expected)
    same(model(image=images()), expected)
    same(model.halves(images()), halves)
    same(model.attention1(model.soft_split0(images()).transpose(1, 2)).chunk(2, dim=1), halves)
    assert isinstance(type(model).tiny(), Named)
    model.memory = "low"
    assert model.attention1.memory == "low"
    assert type(unswap(model) and model) is Named


def test_one_class_for_each_pair_of_classes():
    first, second = layer(), layer()
    swap(nn.ModuleList([first, second]))
    assert type(first) is type(second) and type(first).__name__ == "TokenPerformer"
    assert set(vars(first)) == set(vars(layer())), "nothing is written into the instance"


def test_a_class_that_was_changed_after_the_swap():
    model = nn.ModuleDict({"t": module()})
    swap(model)
    model["t"].__class__ = type("Sharded", (type(model["t"]),), {})
    report = unswap(model)
    assert report.left == {"t": "its class was changed again after the swap"}
    assert isinstance(model["t"], T2TModule) and len(report.swapped) == 2


# ---- what a proof must not rest on


def test_tensors_that_a_module_keeps():
    """After prune, an old spectral norm, or a stored map, a module holds tensors that cannot be deep-copied."""
    model = module()
    nn.utils.prune.l1_unstructured(model.attention1.kqv, "weight", 0.5)
    nn.utils.prune.l1_unstructured(model.project, "weight", 0.5)
    nn.utils.spectral_norm(model.attention2.proj)
    model.attention2.kept = [model.attention2.kqv(torch.ones(1, 2, 144)), {"x": model.project.weight * 2}]
    expected = model(images())
    report = swap(model)
    assert report.swapped == ["", *LAYERS]
    rows = {row.path: row.backend for row in report.rows}
    assert rows["attention1"] == "unfused: kqv has hooks" and rows[""] == "unfused: project has hooks"
    same(model(images()), expected)


def test_what_cannot_be_copied_is_left():
    model = nn.ModuleDict({"t": module(), "l": layer()})
    model["t"].lock = threading.Lock()
    report = swap(model)
    assert "it cannot be copied" in report.left["t"] and report.swapped == ["t.attention1", "t.attention2", "l"]
    model["t"](images())


STATES = {
    "float64 by default": lambda: _default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "triton": lambda: t2t_fast.backend("triton"),
    "deterministic": lambda: torch.random.fork_rng(devices=[]),
}


class _default_dtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_states_of_the_process(state):
    model = module("transformer")
    expected = model(images())
    random = torch.get_rng_state()
    with state():
        report = swap(model)
    assert report.swapped == ["", *LAYERS] and not report.left
    assert torch.equal(torch.get_rng_state(), random)
    same(model(images()), expected)


def test_a_half_model_and_one_whose_weights_are_broken():
    model = module().half()
    swap(model)
    assert isinstance(model.attention1, TokenPerformer) and model.project.weight.dtype == torch.float16
    model = module()
    model.project.weight.data.fill_(float("nan"))
    assert "" in swap(model).swapped


def test_the_live_module_is_never_called():
    calls = []

    class Counting(reference.Token_transformer):
        def forward(self, x):
            calls.append(id(self))
            return super().forward(x)

    model = layer(Counting, 1)
    swap(model)
    assert isinstance(model, TokenTransformer) and calls and id(model) not in calls


class Digits(nn.Module):
    """Unfolds that a digit names, whose results are viewed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Unfold(3, padding=1)])
        self.soft_split0 = nn.Unfold(3)

    def forward(self, x):
        return self.layers[0](x).view(x.shape[0], -1), self.soft_split0(x).view(x.shape[0], -1)


def test_a_name_is_no_licence():
    model = Digits()
    with pytest.raises(NothingToSwap, match="name it in include"):
        swap(model)
    model(images())
    model.t = module()
    assert swap(model).swapped == ["t", "t.attention1", "t.attention2"]
    model(images())


# ---- other projects' shapes


class ForeignAttention(nn.Module):
    """Another project's attention, under names of its own, that returns other than upstream's does."""

    def __init__(self, width, out):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * out)
        self.proj = nn.Linear(out, out)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return v + self.proj((q @ k.mT * 0.2).softmax(-1) @ v)


class ForeignLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(out)
        self.attn = ForeignAttention(width, out)
        self.ffn = nn.Sequential(nn.Linear(out, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, x):
        x = self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class Foreign(nn.Module):
    """As mmpretrain's T2T module: layers that no rule knows, any image size, the grid beside the tokens."""

    def __init__(self):
        super().__init__()
        for index, (kernel, stride, padding) in enumerate(((7, 4, 2), (3, 2, 1), (3, 2, 1))):
            self.add_module(f"soft_split{index}", nn.Unfold(kernel, stride=stride, padding=padding))
        self.attention1, self.attention2 = ForeignLayer(147, 16), ForeignLayer(144, 16)
        self.project = nn.Linear(144, 24)

    @staticmethod
    def _size(unfold, size):
        return tuple((n + 2 * unfold.padding - unfold.kernel_size) // unfold.stride + 1 for n in size)

    def train(self, mode=True):
        super().train(mode)  # and returns nothing, as mmengine's backbones

    def forward(self, x):
        size = self._size(self.soft_split0, x.shape[2:])
        x = self.soft_split0(x).transpose(1, 2)
        for step in (1, 2):
            x = getattr(self, f"attention{step}")(x).transpose(1, 2).reshape(len(x), 16, *size)
            split = getattr(self, f"soft_split{step}")
            size = self._size(split, size)
            x = split(x).transpose(1, 2)
        return self.project(x), size


def test_a_module_with_layers_of_its_own():
    torch.manual_seed(0)
    model = Foreign()
    x = torch.randn(2, 3, 32, 48)
    expected = model(x)
    report = swap(model)
    assert report.swapped == [""] and "returns a tuple of tokens 3, grid 3" in str(report)
    assert report.rows[0].backend == "unfused: attention1 is ForeignLayer"
    same(model(x), expected)
    assert model(x)[1] == (2, 3)


class Article(reference.lanl.Tokens2Token):
    """As the articles' own code, which counts tokens by kernels, strides and paddings that the module keeps."""

    def __init__(self, *args):
        super().__init__(*args)
        for index, window in enumerate(self.windows):
            for letter, number in zip("ksp", window, strict=True):
                setattr(self, f"{letter}{index}", number)

    def forward(self, x):
        batch, _, height, width = x.shape
        x = self.transformer1(self.soft_split0(x).transpose(1, 2)).transpose(1, 2)
        width, height, _ = reference.lanl.count_tokens(width, height, self.k0, self.s0, self.p0)
        x = self.soft_split1(x.reshape(batch, self.token_chan, height, width)).transpose(1, 2)
        x = self.transformer2(x).transpose(1, 2)
        width, height, _ = reference.lanl.count_tokens(width, height, self.k1, self.s1, self.p1)
        return self.project(self.soft_split2(x.reshape(batch, self.token_chan, height, width)).transpose(1, 2))


def test_the_articles_module():
    torch.manual_seed(0)
    model = Article((1, 30, 50), (7, 3, 3), 1, 16, 24)
    x = torch.randn(2, 1, 30, 50)
    expected = model(x)
    assert swap(model).swapped == ["", "transformer1", "transformer2"]
    same(model(x), expected)


def test_vit_pytorch():
    """Its unfolds have a Transpose behind them, which takes any strides: swapped if they are named."""
    from support import vit_pytorch

    torch.manual_seed(0)
    options = dict(image_size=32, num_classes=4, dim=24, depth=1, heads=2, mlp_dim=48, dim_head=8)
    model = vit_pytorch.T2TViT("reference", **options, t2t_layers=((3, 2), (3, 2))).eval()
    expected = model(images())
    with pytest.raises(NothingToSwap, match=r"left: to_patch_embedding.1 \(Unfold\): .*name it in include"):
        swap(model)
    report = swap(model, include=["to_patch_embedding.1", "to_patch_embedding.5"])
    assert report.swapped == ["to_patch_embedding.1", "to_patch_embedding.5"]
    same(model(images()), expected)


class FeedForward(nn.Module):
    """Fold, normalise, unfold, as video inpainting has it between its two Linears."""

    def __init__(self):
        super().__init__()
        window = dict(kernel_size=3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 18), nn.Sequential(nn.GELU(), nn.Linear(18, 8))
        self.fold, self.unfold = nn.Fold((8, 8), **window), nn.Unfold(**window)

    def forward(self, x):
        x = self.fc1(x).permute(0, 2, 1)
        count = self.fold(self.unfold(x.new_ones(len(x), 2, 8, 8)))
        return self.fc2(self.unfold(self.fold(x) / count).permute(0, 2, 1))


def test_a_video_models_feed_forward():
    torch.manual_seed(0)
    model, x = FeedForward(), torch.randn(2, 16, 8)
    expected = model(x)
    report = swap(model, include=["fold", "unfold"])
    assert report.swapped == ["fold", "unfold"]
    same(model(x), expected)
