"""Other projects' modules: mmpretrain, the articles, vit-pytorch, video inpainting."""

import torch
import torch.nn.utils.prune
from torch import nn

from support.swapping import images, same
from t2t_fast import reference
from t2t_fast.interop.swap import swap


class ForeignAttention(nn.Module):
    """Another project's attention, with names of its own, that computes something else than upstream's."""

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
    """Like mmpretrain's T2T module: layers that no rule matches, any image size, the grid returned with the tokens."""

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
        super().train(mode)  # returns nothing, like mmengine's backbones

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
    """Like the articles' own code, which counts tokens from kernels, strides and paddings stored in the module."""

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
    """Attention and MLP are swapped. A Transpose, which takes any strides, follows the unfolds: they are swapped if
    include names them.
    """
    from support import vit_pytorch

    torch.manual_seed(0)
    options = dict(image_size=32, num_classes=4, dim=24, depth=1, heads=2, mlp_dim=48, dim_head=8)
    model = vit_pytorch.T2TViT("reference", **options, t2t_layers=((3, 2), (3, 2))).eval()
    expected = model(images())
    layers = ["to_patch_embedding.3.layers.0.0", "to_patch_embedding.3.layers.0.1"]
    layers += ["transformer.layers.0.0", "transformer.layers.0.1"]
    report = swap(model)
    assert report.swapped == layers
    assert "name it in include" in report.left["to_patch_embedding.1"]
    report = swap(model, include=["to_patch_embedding.1", "to_patch_embedding.5"])
    assert report.swapped == ["to_patch_embedding.1", "to_patch_embedding.5"]
    same(model(images()), expected)


class FeedForward(nn.Module):
    """Fold, normalise, unfold, as video inpainting does between two Linears."""

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
