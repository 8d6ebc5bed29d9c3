"""Matching names of a checkpoint and a model: prefixes, wrappers, entries."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from support import golden
from support.checkpoints import exact_state, same, saved, small
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import load_checkpoint, read_state_dict
from t2t_fast.interop.checkpoints.names import comparable, match
from t2t_fast.interop.checkpoints.projects import layout
from t2t_fast.models import T2TViT, lanl


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


class Wrapped(nn.Module):
    """A user's model that holds a T2T-ViT under a given name."""

    def __init__(self, name, model):
        super().__init__()
        self.add_module(name, model)


PREFIXES = [
    "module.",
    "model.",
    "backbone.",
    "encoder.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "model.backbone.",
    "backbone.model.",
    "module.model.encoder.",
    "encoder.module.backbone._orig_mod.",
    "_orig_mod.model.module.net.encoder.backbone.",
    "0.",
    "blocks.",
    "head.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_any_order(tmp_path, prefix):
    source, model = small(), small()
    path = saved(tmp_path / "m.pth", {"state_dict": prefixed(prefix, source.state_dict())})
    assert load_checkpoint(model, path).complete
    assert same(model, source.state_dict())


@pytest.mark.parametrize("name", ["backbone", "encoder", "model", "module", "net", "blocks"])
@pytest.mark.parametrize("prefix", ["", "{}.", "module.{}.", "model.{}.", "module.other."])
def test_prefixes_of_the_models_own(name, prefix):
    """A prefix that belongs to the model's own names is kept, and added to names without it."""
    source, model = small(), Wrapped(name, small())
    report = load_checkpoint(model, prefixed(prefix.format(name), source.state_dict()))
    assert report.complete and same(getattr(model, name), source.state_dict())


def test_mmpretrains_encoder_is_not_a_prefix():
    names = golden.key_table("mmpretrain_t2t_vit_t_14")["tensors"]
    shapes = {name: tuple(entry["shape"]) for name, entry in names.items()}
    for prefix in ("", "encoder.", "module.encoder."):
        found = match(prefixed(prefix, shapes), shapes)
        assert found.names == {prefix + name: name for name in shapes}


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_articles_backbone_is_not_a_prefix(prefix):
    source, model = (lanl.T2TViT((3, 64, 64), (7, 3, 3), 10, 8, 8, depth=1) for _ in range(2))
    report = load_checkpoint(model, prefixed(prefix, source.state_dict()))
    assert report.complete and report.layout == "lanl" and same(model, source.state_dict())


def test_wrappers_inside_of_names():
    source, model = small(), small()
    state = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.").replace(
            "token.", "token.module._orig_mod."
        ): v
        for name, v in source.state_dict().items()
    }
    assert load_checkpoint(model, state).complete and same(model, source.state_dict())
    twin = small()
    twin.tokens_to_token = nn.DataParallel(twin.tokens_to_token)
    twin.blocks[0] = checkpoint_wrapper(torch.compile(twin.blocks[0]))
    assert load_checkpoint(twin, source.state_dict()).complete
    assert torch.equal(twin.tokens_to_token.module.project.weight, source.tokens_to_token.project.weight)
    again = small()
    load_checkpoint(again, twin.state_dict())
    assert same(again, source.state_dict())


def test_the_report_shows_the_prefix():
    report = load_checkpoint(Wrapped("net", small()), prefixed("model.", small().state_dict()))
    assert report.prefix == ("model.", "net.") and "'model.' -> 'net.'" in str(report)
    assert "prefix" not in str(load_checkpoint(small(), small().state_dict()))


def test_tensors_outside_the_prefix(tmp_path):
    """A classifier beside its backbone, a loss beside the model."""
    source, model = small(), small()
    state = prefixed("model.backbone.", source.state_dict())
    for name in ("head.weight", "head.bias"):
        state[f"model.{name}"] = state.pop(f"model.backbone.{name}")
    state["criterion.weight"] = torch.ones(10)
    with pytest.raises(CheckpointError, match=r"unexpected +1 +criterion\.weight"):
        load_checkpoint(model, state)
    assert load_checkpoint(model, state, strict=False).missing == ()
    assert same(model, source.state_dict())


def test_the_same_name_twice_is_an_error():
    first, second, model = small().state_dict(), small().state_dict(), small()
    before = exact_state(model)
    ambiguous = {
        r"with and without the prefix of a wrapper: norm\.bias, module\.norm\.bias": {
            **prefixed("model.", first),
            "norm.bias": first["norm.bias"],
            "module.norm.bias": second["norm.bias"],
        },
        r"equally well under several prefixes .*student.*teacher": {
            **prefixed("student.", first),
            **prefixed("teacher.", second),
        },
        r"unexpected +\d+ +module\.": {**first, **prefixed("module.", second)},
    }
    for text, state in ambiguous.items():
        with pytest.raises(CheckpointError, match=text):
            load_checkpoint(model, state)
        assert exact_state(model) == before
    twins = nn.ModuleDict({"student": small(), "teacher": small()})
    with pytest.raises(CheckpointError, match=r"equally well under several prefixes .*student.*teacher"):
        load_checkpoint(twins, first)
    assert load_checkpoint(twins, {**prefixed("student.", first), **prefixed("teacher.", second)}).complete
    assert load_checkpoint(twins.student, first).complete and same(twins.student, first)


def test_a_model_that_has_a_part_under_two_names():
    source = small()
    model = Wrapped("module", small())
    model.blocks = model.module.blocks
    assert load_checkpoint(model, model.state_dict()).complete
    assert load_checkpoint(model, prefixed("model.", source.state_dict())).complete
    assert same(model.module, source.state_dict())


def test_a_few_equal_suffixes_are_no_match():
    """Norms of another network may have the same shapes; that does not make them a match."""
    model = small()
    before = exact_state(model)
    state = {
        f"bert.layer.{i}.output.{name}": torch.full((8,), 7.0)
        for i in range(20)
        for name in ("norm.weight", "norm.bias")
    }
    with pytest.raises(CheckpointError, match="not one tensor of it belongs to this model"):
        load_checkpoint(model, state, strict=False)
    assert exact_state(model) == before


def test_a_part_of_a_model():
    source, model = small(), small()
    report = load_checkpoint(model.tokens_to_token, prefixed("module.", source.state_dict()), strict=False)
    assert report.missing == () and report.prefix == ("tokens_to_token.", "")
    assert same(model.tokens_to_token, source.tokens_to_token.state_dict())
    with pytest.raises(CheckpointError, match=r"unexpected +\d+ +cls_token"):
        load_checkpoint(model.tokens_to_token, source.state_dict())


def test_matching_takes_little_time_for_many_names():
    source = {f"a{i}.weight": (8,) for i in range(50_000)}
    target = {"weight": (9,), "bias": (9,)}
    assert match(source, target).score[0] == 0


def test_layouts():
    assert layout(golden.key_table("official_t2t_vit_14")["tensors"]) == "upstream"
    assert layout(prefixed("model.backbone.", golden.key_table("mmpretrain_t2t_vit_t_14")["tensors"])) == "mmpretrain"
    assert layout(golden.key_table("vitpytorch_t2tvit_readme")["tensors"]) == "vit-pytorch"
    assert layout(golden.key_table("lanl_t2t_vit_default")["tensors"]) == "lanl"


@pytest.mark.parametrize("name", ["t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"])
def test_mmpretrain_names_are_upstreams(name):
    theirs = golden.key_table(f"mmpretrain_{name}")["tensors"]
    expected = set(golden.key_table(f"official_{name}")["tensors"]) - {"head.weight", "head.bias"}
    assert set(comparable(theirs).values()) == expected


@pytest.mark.parametrize("table", golden.key_table_names())
def test_comparable_names_are_unique(table):
    names = golden.key_table(table)["tensors"]
    assert len(set(comparable(names).values())) == len(names)
    if table.startswith("official_t2t"):
        assert comparable(names) == {name: name for name in names}


ENTRIES = {
    "transfer_learning.py": lambda state: {"net": prefixed("module.", state), "acc": 98.0, "epoch": 1},
    "PyTorch's tutorial": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "Lightning": lambda state: {
        "state_dict": prefixed("model.", state),
        "pytorch-lightning_version": "2.0",
        "hyper_parameters": {"lr": 1e-3},
    },
    "DeiT": lambda state: {"model": {**state, "norm.bias": state["norm.bias"] + 1}, "model_ema": state},
    "nested": lambda state: {"model_ema": {"decay": 0.99, "state_dict": state}},
    "unknown name": lambda state: {"weights": state, "best_acc": torch.tensor(81.5)},
    "scalars beside tensors": lambda state: {**state, "epoch": 3, "acc": np.float32(81.5), "note": "best"},
    "beside another net": lambda state: {"model": {"fc.weight": torch.ones(3, 3)}, "t2t": state},
    "optimizer": lambda state: {
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}},
        "state_dict": state,
    },
}
SOURCES = dict(
    zip(ENTRIES, ["net", "model_state_dict", "state_dict", "model_ema", "model_ema.state_dict"], strict=False)
)


@pytest.mark.parametrize("form", ["file", "object"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_entries(tmp_path, entry, form):
    source, model = small(), small()
    content = ENTRIES[entry](source.state_dict())
    report = load_checkpoint(model, saved(tmp_path / "m.pth", content) if form == "file" else content)
    assert report.complete and same(model, source.state_dict())
    assert report.source == SOURCES.get(entry, report.source)
    assert report.path == (str(tmp_path / "m.pth") if form == "file" else "state dict")


def test_averaged_weights_by_any_name():
    averaged, plain, model = small().state_dict(), small().state_dict(), small()
    for name in ("model_ema", "ema", "ema_state_dict", "net_EMA"):
        load_checkpoint(model, {name: averaged, "net": plain})
        assert same(model, averaged)
        load_checkpoint(model, {name: averaged, "net": plain}, use_ema=False)
        assert same(model, plain)
    with pytest.raises(CheckpointError, match="holds averaged weights alone"):
        load_checkpoint(model, {"model_ema": averaged}, use_ema=False)
    assert load_checkpoint(model, {"schema": plain, "ema": {"decay": torch.tensor(0.9)}}).source == "schema"


def test_entries_that_fit_equally_well():
    first, second, model = small().state_dict(), small().state_dict(), small()
    before = exact_state(model)
    with pytest.raises(CheckpointError, match=r"several state dicts that fit equally well, .*student, teacher"):
        load_checkpoint(model, {"student": first, "teacher": second})
    assert exact_state(model) == before
    assert load_checkpoint(model, {"best": first, "state_dict": second}).source == "state_dict"
    assert load_checkpoint(model, {"best": first, "state_dict": first}).complete  # one dict under two names


@pytest.mark.parametrize(
    "make",
    [dict, OrderedDict, nn.ParameterDict, lambda state: state],
    ids=["dict", "OrderedDict", "ParameterDict", "state dict"],
)
def test_state_dicts_instead_of_a_path(make):
    source, model = small(), small()
    if make is nn.ParameterDict:
        state = {name: nn.Parameter(value) for name, value in source.state_dict().items()}
    else:
        state = make(source.state_dict())
    assert load_checkpoint(model, state).complete and same(model, source.state_dict())
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), source.parameters(), strict=True))


def test_arrays_instead_of_tensors():
    source, model = small(), small()
    load_checkpoint(model, {name: value.numpy() for name, value in source.state_dict().items()})
    assert same(model, source.state_dict())


def test_numpys_numbers_in_a_file(tmp_path):
    """NumPy's numbers load, and the safe globals of the process are the same afterwards."""
    allowed = set(torch.serialization.get_safe_globals())
    numbers = {f"n{code}": np.array(1, dtype=code)[()] for code in "?bBhHiIlLqQefdFD"}
    source, model = small(), small()
    path = saved(tmp_path / "m.pth", {"state_dict": source.state_dict(), **numbers})
    assert load_checkpoint(model, path).complete and same(model, source.state_dict())
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_safe_globals_of_the_user_remain(tmp_path):
    import argparse

    path = saved(tmp_path / "m.pth", {"state_dict": small().state_dict(), "args": argparse.Namespace(lr=1)})
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert load_checkpoint(small(), path).complete
        assert argparse.Namespace in torch.serialization.get_safe_globals()


class Settings:
    """A class that a user may add to the safe globals."""

    def __init__(self, lr):
        self.lr = lr


def test_a_class_that_the_user_allows(tmp_path):
    path = saved(tmp_path / "m.pth", {"state_dict": small().state_dict(), "settings": Settings(1)})
    with pytest.raises(CheckpointError, match=r"it holds a pickled .*Settings, .*add_safe_globals"):
        load_checkpoint(small(), path)
    with torch.serialization.safe_globals([Settings]):
        assert load_checkpoint(small(), path).complete


def test_read_state_dict_removes_wrapper_prefixes(tmp_path):
    state = small().state_dict()
    path = saved(tmp_path / "m.pth", {"net": prefixed("module._orig_mod.", state), "acc": 1.0})
    found, source = read_state_dict(path)
    assert source == "net" and found.keys() == state.keys() and torch.equal(found["norm.bias"], state["norm.bias"])
    path = saved(tmp_path / "n.pth", {"norm.bias": torch.ones(2), "module.norm.bias": torch.ones(2)})
    with pytest.raises(CheckpointError, match="with and without the prefix of a wrapper"):
        read_state_dict(path)


def test_bytes_and_paths(tmp_path):
    path = saved(tmp_path / "m.pth", small().state_dict())
    assert load_checkpoint(small(), str(path)).complete

    class Path:
        def __fspath__(self):
            return str(path)

    assert load_checkpoint(small(), Path()).complete
    for wrong in (None, 3, path.read_bytes(), [path], small()):
        with pytest.raises(TypeError, match=r"path must be a str, an os\.PathLike or a state dict, got"):
            load_checkpoint(small(), wrong)


def test_tensors_without_axes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.0))
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("flag", torch.tensor(False))

    source, model = Model(), Model()
    source.norm(torch.randn(3, 4))
    source.scale.data.fill_(3)
    source.flag.fill_(True)
    assert load_checkpoint(model, source.state_dict()).complete and same(model, source.state_dict())
    numbers = {**source.state_dict(), "scale": 3.0, "norm.num_batches_tracked": np.int64(7), "flag": False}
    assert load_checkpoint(model, numbers).complete
    assert model.norm.num_batches_tracked == 7 and model.scale == 3 and not model.flag


def test_create_model_with_a_state_dict():
    from t2t_fast import create_model

    options = dict(embed_dim=48, depth=2, num_heads=3, token_dim=32, img_size=64)
    source = create_model("t2t_vit_14", **options)
    with pytest.warns(UserWarning, match="^create_model: state dict has no head of 10 classes"):
        model = create_model("t2t_vit_14", num_classes=10, checkpoint=source.state_dict(), **options)
    assert isinstance(model, T2TViT) and torch.equal(model.norm.weight, source.norm.weight)
