"""``convert_checkpoint`` and ``t2t-fast convert``: other projects' names, other file types, equal logits."""

import pickle
import pickletools
from itertools import permutations

import numpy as np
import pytest
import torch

import t2t_fast
from support import mmpretrain_model, vit_pytorch
from support.checkpoints import same, saved, tiny
from support.command import run
from support.hostile import Call, dumped
from t2t_fast import convert_checkpoint, reference
from t2t_fast.cli.arguments import PROJECTS as CHOICES
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import convert as module
from t2t_fast.interop.checkpoints import load_checkpoint, read_state_dict

SIZES = dict(embed_dim=48, depth=2, num_heads=3, token_dim=32)  # of mmpretrain_model, too
MODELS = {"performer": "t2t_vit_14", "transformer": "t2t_vit_t_14"}
PROJECTS = ("upstream", "mmpretrain", "paddle", "timm")
ENDINGS = (".pth.tar", ".safetensors", ".pdparams")


def source_model(tokens_type="transformer", **options):
    return tiny(**{**dict(mlp_ratio=3, tokens_type=tokens_type), **options}).eval()


def convert(source, target, tokens_type="transformer", **options):
    return convert_checkpoint(source, target, model=MODELS[tokens_type], **{**SIZES, **options})


def images(channels=3):
    return torch.randn(2, channels, 64, 64)


def unchanged(folder, *names):
    """Whether a folder has only the named entries, so that no temporary file is left."""
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.fixture
def file(tmp_path):
    """An upstream checkpoint as its training script writes it."""
    return saved(tmp_path / "m.pth.tar", {"epoch": 3, "state_dict": source_model().state_dict()})


# ---- strict loads into the projects' own models


def test_into_mmpretrains_classifier(tmp_path):
    source, model = source_model(), mmpretrain_model.Classifier().eval()
    path = saved(tmp_path / "m.pth", source.state_dict())
    report = convert(path, tmp_path / "n.pth", to="mmpretrain")
    model.load_state_dict(torch.load(tmp_path / "n.pth"), strict=True)
    x = images()
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)
    factors = dict(report.rescaled)
    assert factors["backbone.encoder.1.attn.qkv.weight"] == pytest.approx(3 / 48) and len(factors) == 4
    assert report.max_rel_error < 1e-5 and "trained_with='mmpretrain'" in str(report)


def test_into_mmpretrains_backbone(tmp_path):
    source, model = source_model(), mmpretrain_model.T2TViT().eval()
    path = saved(tmp_path / "m.pth", source.state_dict())
    report = convert(path, tmp_path / "n.pth", to="mmpretrain", head=False)
    assert report.left_out == ("head.weight", "head.bias") and "left out" in str(report)
    model.load_state_dict(torch.load(tmp_path / "n.pth"), strict=True)
    x = images()
    source.reset_classifier(0)
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)


def test_mmpretrains_published_weights_keep_their_queries(tmp_path, file):
    report = convert(file, tmp_path / "n.pth", to="mmpretrain", rescale=False)
    state = torch.load(tmp_path / "n.pth")
    expected = torch.load(file)["state_dict"]["blocks.1.attn.qkv.weight"]
    assert torch.equal(state["backbone.encoder.1.attn.qkv.weight"], expected)
    assert report.rescaled == () and report.max_abs_error == 0
    assert "mmpretrain 1.2, whose attention scale differs, computes other logits" in str(report)


def test_from_weights_that_mmpretrain_trained(tmp_path):
    """Upstream's model computes mmpretrain's logits; the way back gives the file, up to rounding twice."""
    source, model = (
        mmpretrain_model.Classifier().eval(),
        reference.T2T_ViT(img_size=64, mlp_ratio=3, num_classes=10, tokens_type="transformer", **SIZES),
    )
    path = saved(tmp_path / "m.pth", {"meta": {}, "state_dict": source.state_dict()})
    convert(path, tmp_path / "n.pth", to="upstream", trained_with="mmpretrain")
    model.load_state_dict(torch.load(tmp_path / "n.pth"), strict=True)
    x = images()
    torch.testing.assert_close(model.eval()(x), source(x), rtol=1e-4, atol=1e-5)
    convert(tmp_path / "n.pth", tmp_path / "o.pth", to="mmpretrain")
    back = torch.load(tmp_path / "o.pth")
    for name, value in source.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=2**-22 if "qkv" in name else 0, atol=0)


@pytest.mark.parametrize("tokens_type", MODELS)
def test_into_timms_model(tmp_path, tokens_type):
    vision_transformer = pytest.importorskip("timm", reason="timm is not installed").models.vision_transformer
    source = source_model(tokens_type)
    path = saved(tmp_path / "m.pth", source.state_dict())
    convert(path, tmp_path / "n.safetensors", tokens_type, to="timm")
    model = vision_transformer.VisionTransformer(
        embed_layer=lambda **options: t2t_fast.T2TEmbed(token_dim=32, tokens_type=tokens_type, **options),
        norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=1e-5),
        qkv_bias=False,
        img_size=64,
        mlp_ratio=3,
        num_classes=10,
        **{name: SIZES[name] for name in ("embed_dim", "depth", "num_heads")},
    ).eval()
    model.load_state_dict(read_state_dict(tmp_path / "n.safetensors")[0], strict=True)
    x = images()
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens_type", MODELS)
def test_into_paddles_layout(tmp_path, tokens_type):
    """Linear weights are (in, out), the random features are not; plain unpickling gives arrays, in NumPy 1 too."""
    source = source_model(tokens_type)
    path = saved(tmp_path / "m.pth", source.state_dict())
    convert(path, tmp_path / "n.pdparams", tokens_type, to="paddle")
    data = (tmp_path / "n.pdparams").read_bytes()
    words = {word for _, word, _ in pickletools.genops(data) if isinstance(word, str)}
    assert {"numpy", "ndarray"} <= words and not any(word.startswith("numpy.") for word in words)
    arrays = pickle.loads(data)
    assert arrays.pop("StructuredToParameterName@@").keys() == arrays.keys()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    state = source.state_dict()
    for theirs, ours in (
        ("patch_embed.proj.weight", "tokens_to_token.project.weight"),
        ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("head.weight", "head.weight"),
    ):
        assert np.array_equal(arrays[theirs], state[ours].numpy().T)
    if tokens_type == "performer":
        assert np.array_equal(arrays["patch_embed.attn1.w"], state["tokens_to_token.attention1.w"].numpy())
    assert np.array_equal(arrays["pos_embed"], state["pos_embed"].numpy())
    model = source_model(tokens_type)
    assert load_checkpoint(model, tmp_path / "n.pdparams").layout == "paddle" and same(model, state)


# ---- names and file types are independent


@pytest.mark.parametrize(("first", "second"), list(permutations(PROJECTS, 2)))
def test_every_pair_of_projects_and_back(tmp_path, first, second):
    """Bit for bit, where the queries stay."""
    state = source_model(depth=1).state_dict()
    endings = dict(zip(PROJECTS, (".pth", ".bin", ".pdparams", ".safetensors"), strict=True))
    a, b, c, d = (tmp_path / f"{i}{endings[to]}" for i, to in enumerate(("upstream", first, second, first)))
    saved(a, state)
    for old, new, to in ((a, b, first), (b, c, second), (c, d, first)):
        report = convert(old, new, to=to, depth=1, rescale=False)
        assert report.to == to and report.max_abs_error == 0 and report.tensors == len(state)
    contents = [read_state_dict(path)[0] for path in (b, d)]
    assert contents[0].keys() == contents[1].keys()
    assert all(torch.equal(contents[0][name], contents[1][name]) for name in contents[0])
    model = source_model(depth=1)
    assert load_checkpoint(model, c).layout == second and same(model, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_file_types_keep_every_bit(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in source_model("performer").state_dict().items()}
    state["norm.bias"] = state["norm.bias"].double()  # mixed dtypes stay, too
    old = saved(tmp_path / "m.pth", state)
    for index, ending in enumerate((*ENDINGS, ".pth")):
        new = tmp_path / f"{index}{ending}"
        report = convert_checkpoint(old, new)
        assert report.model is None and "same tensors, bit for bit" in str(report)
        assert set(report.dtypes) == {str(dtype).removeprefix("torch."), "float64"}
        old = new
    final = torch.load(old)
    assert final.keys() == state.keys()
    assert all(final[name].dtype == value.dtype and torch.equal(final[name], value) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_converted_as_they_are(tmp_path, dtype):
    path = saved(tmp_path / "m.pth", {k: v.to(dtype) for k, v in source_model().state_dict().items()})
    report = convert(path, tmp_path / "n.pth", to="mmpretrain")
    assert report.dtypes == (str(dtype).removeprefix("torch."),) and 0 < report.max_rel_error < 2e-2


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("project", ["vit-pytorch", "lanl"])
def test_other_networks_change_their_file_type_only(tmp_path, project, ending):
    model = {
        "vit-pytorch": lambda: vit_pytorch.T2TViT(
            "reference",
            image_size=64,
            num_classes=10,
            dim=48,
            depth=1,
            heads=3,
            mlp_dim=96,
            t2t_layers=((7, 4), (3, 4)),
        ),
        "lanl": lambda: t2t_fast.models.lanl.T2TViT((3, 64, 64), (7, 3, 3), 10, 48, 32, depth=1),
    }[project]
    source, twin = model(), model()
    path = saved(tmp_path / "m.pth", {"state_dict": source.state_dict()})
    assert convert_checkpoint(path, tmp_path / f"n{ending}", to=project).layout == project
    assert load_checkpoint(twin, tmp_path / f"n{ending}").complete and same(twin, source.state_dict())
    for to in PROJECTS:
        with pytest.raises(CheckpointError, match=f"{project}'s weights cannot become {to}'s: .* file type only"):
            convert_checkpoint(path, tmp_path / "o.pth", to=to)
    ours = saved(tmp_path / "u.pth", source_model().state_dict())
    with pytest.raises(CheckpointError, match=f"upstream's weights cannot become {project}'s"):
        convert_checkpoint(ours, tmp_path / "o.pth", to=project)
    assert unchanged(tmp_path, "m.pth", "u.pth", f"n{ending}")


def test_averaged_weights(tmp_path):
    states = {name: source_model().state_dict() for name in ("state_dict", "state_dict_ema")}
    path = saved(tmp_path / "m.pth", states)
    assert convert(path, tmp_path / "a.pth", to="upstream").entry == "state_dict_ema"
    assert convert(path, tmp_path / "b.pth", to="upstream", use_ema=False).entry == "state_dict"
    for name, entry in (("a", "state_dict_ema"), ("b", "state_dict")):
        found = torch.load(tmp_path / f"{name}.pth")
        assert all(torch.equal(found[key], value) for key, value in states[entry].items())


def test_prefixes_are_removed(tmp_path):
    state = source_model().state_dict()
    path = saved(tmp_path / "m.pth", {f"module.model.{name}": value for name, value in state.items()})
    convert(path, tmp_path / "n.pth", to="upstream")
    assert torch.load(tmp_path / "n.pth").keys() == state.keys()
    convert_checkpoint(path, tmp_path / "o.pth")
    assert torch.load(tmp_path / "o.pth").keys() == {f"model.{name}" for name in state}


def test_tensors_do_not_bring_their_storage(tmp_path):
    """A file of views of one large storage would be as large as the storage, several times."""
    values = torch.randn(1000, 100)
    path = saved(tmp_path / "m.pth", {"weight": values[:2], "bias": values[:, 0]})
    convert_checkpoint(path, tmp_path / "n.pth")
    assert (tmp_path / "n.pth").stat().st_size < 10_000


# ---- the model


@pytest.mark.parametrize("name", ["t2t_vit_c_14", "vit_deit_tiny_distilled_patch16_224"])
def test_the_model_is_found_by_names_and_shapes(name):
    options = dict(num_classes=7, in_chans=1, img_size=(32, 32))
    with torch.device("meta"):
        shapes = {key: tuple(v.shape) for key, v in t2t_fast.models.build_model(name, **options).state_dict().items()}
    visible = module._visible_options(shapes, {})
    assert visible == options and module._only_model(shapes, visible) == name


def test_heads_cannot_be_seen(tmp_path):
    with torch.device("meta"):
        model = t2t_fast.models.build_model("t2t_vit_14", img_size=32, num_classes=0)
    path = saved(tmp_path / "m.pth", {name: torch.zeros(value.shape) for name, value in model.state_dict().items()})
    with pytest.raises(ValueError, match="tensors fit t2t_vit_14, t2t_vit_14_resnext, which differ in their number of"):
        convert_checkpoint(path, tmp_path / "n.pth", to="timm")


def test_the_scale_of_the_model_decides_the_factor(tmp_path, file):
    report = convert(file, tmp_path / "n.pth", to="mmpretrain", qk_scale=0.5)
    factors = dict(report.rescaled)
    assert factors["backbone.encoder.0.attn.qkv.weight"] == pytest.approx(0.5 / 16**0.5)


def test_grids_that_are_not_square(tmp_path):
    path = saved(tmp_path / "m.pth", source_model(img_size=(64, 96)).state_dict())
    with pytest.raises(CheckpointError, match=r"24 entries, which no square grid has; give img_size=\(H, W\)"):
        convert(path, tmp_path / "n.pth", to="timm")
    convert(path, tmp_path / "n.pth", to="timm", img_size=(64, 96))
    with pytest.raises(CheckpointError, match=r"no square grid|its sizes are not those"):
        convert(path, tmp_path / "o.pth", to="timm", img_size=(64, 64))


# ---- refusals leave no file and change none


def test_networks_that_a_project_does_not_have(tmp_path):
    performer = saved(tmp_path / "p.pth", source_model("performer").state_dict())
    with pytest.raises(CheckpointError, match=r"mmpretrain's T2T_ViT .* does not have .*attention1\.w"):
        convert(performer, tmp_path / "n.pth", "performer", to="mmpretrain")
    blocks = saved(tmp_path / "s.pth", source_model("performer", block="se").state_dict())
    for to in ("paddle", "timm"):
        with pytest.raises(CheckpointError, match=r"\(.*plain blocks\) does not have blocks\.0\."):
            convert_checkpoint(blocks, tmp_path / "n.pth", to=to, model="t2t_vit_14_se", **SIZES)
    assert unchanged(tmp_path, "p.pth", "s.pth")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(to="keras"), ValueError, "to must be one of upstream, mmpretrain, paddle, timm, vit-pytorch, lanl, got"),
        (dict(model="resnet50"), ValueError, "model must be one of t2t_vit_7, .* got 'resnet50'"),
        (dict(to="timm", trained_with="keras"), ValueError, "trained_with must be one of mmpretrain, got 'keras'"),
        (dict(model="t2t_vit_7"), ValueError, "need to=PROJECT, one with upstream's network: .*; got to=None"),
        (dict(head=False), ValueError, "need to=PROJECT"),
        (dict(to="lanl", head=False), ValueError, "need to=PROJECT.* got to='lanl'"),
        (dict(to="timm", colour="red", model="t2t_vit_t_14"), TypeError, "colour"),
        (dict(to="timm"), CheckpointError, "no model of .* has its tensors with num_classes=10, .*; give model=NAME"),
        (dict(to="timm", model="t2t_vit_7"), CheckpointError, r"m\.pth\.tar: it does not fit the model\n +missing"),
        (dict(to="timm", model="t2t_vit_t_14", num_classes=4, **SIZES), CheckpointError, "its sizes are not those of"),
    ],
)
@pytest.mark.filterwarnings("ignore:load_checkpoint")
def test_bad_arguments(tmp_path, file, options, error, text):
    with pytest.raises(error, match=text):
        convert_checkpoint(file, tmp_path / "n.pth", **options)
    assert unchanged(tmp_path, "m.pth.tar")


def test_bad_paths(tmp_path, file):
    for arguments, error, text in (
        ((3, "n.pth"), TypeError, "source must be a str or an .*, got int"),
        ((file, None), TypeError, "target must be a str or an .*, got NoneType"),
        ((tmp_path / "nowhere.pth", tmp_path / "n.pth"), FileNotFoundError, "there is no file"),
        ((file, tmp_path / "n.onnx"), ValueError, r"target must end in one of \.safetensors, \.pdparams, \.pth, "),
        ((file, tmp_path / "nowhere" / "n.pth"), FileNotFoundError, "there is no folder .*nowhere for "),
    ):
        with pytest.raises(error, match=text):
            convert_checkpoint(*arguments)
    assert unchanged(tmp_path, "m.pth.tar")


def test_existing_files_are_kept_unless_overwritten(tmp_path, file):
    target = tmp_path / "n.pth"
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"n\.pth exists; overwrite=True replaces a file"):
        convert_checkpoint(file, target)
    assert target.read_bytes() == b"mine"
    convert_checkpoint(file, target, overwrite=True)
    assert torch.load(target).keys() == torch.load(file)["state_dict"].keys()
    before = file.read_bytes()
    (tmp_path / "link.pth").symlink_to(file)
    for path in (file, tmp_path / "link.pth", tmp_path / ".." / tmp_path.name / "m.pth.tar"):
        with pytest.raises(ValueError, match="target must be another file than source"):
            convert_checkpoint(file, path, overwrite=True)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FileExistsError):
        convert_checkpoint(file, tmp_path / "folder.pth", overwrite=True)
    assert file.read_bytes() == before


def test_a_wrong_file_is_removed(tmp_path, file, monkeypatch):
    """A bug in a table or a writer cannot leave a wrong file, or lose one that exists."""
    target = tmp_path / "n.pth"
    target.write_bytes(b"mine")
    original = module.to_project

    def swapped(names, to):
        first, second = "blocks.0.norm1.bias", "blocks.0.norm2.bias"
        names = original(names, to)
        return {**names, first: names[second], second: names[first]}

    def foreign(names, to):
        return {name: f"colour.{index}" for index, name in enumerate(names)}

    def careless(path, state):
        torch.save({**state, "norm.bias": state["norm.bias"] + 1}, path)

    state = torch.load(file)["state_dict"]
    state["blocks.0.norm1.bias"] += 1
    path = saved(tmp_path / "o.pth", state)
    monkeypatch.setattr(module, "to_project", swapped)
    with pytest.raises(CheckpointError, match=r"the logits of the new file differ .* allowed 1e-09; nothing"):
        convert(path, target, to="timm", overwrite=True)
    monkeypatch.setattr(module, "to_project", foreign)
    with pytest.raises(CheckpointError, match="does not fit"):
        convert(path, target, to="timm", overwrite=True)
    monkeypatch.setattr(module, "to_project", original)
    monkeypatch.setattr(module, "write", careless)
    with pytest.raises(CheckpointError, match="the new file has other tensors than were written"):
        convert(path, target, to="timm", overwrite=True)
    assert target.read_bytes() == b"mine" and unchanged(tmp_path, "m.pth.tar", "n.pth", "o.pth")


def test_a_full_disk_changes_nothing(tmp_path, file, monkeypatch):
    def full(state, path):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(file, tmp_path / "n.pth")
    assert unchanged(tmp_path, "m.pth.tar")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = source_model().state_dict()
    state["norm.bias"][0] = float("nan")
    path = saved(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError, match="logits that are not finite"):
        convert(path, tmp_path / "n.pth", to="timm")
    convert_checkpoint(path, tmp_path / "n.safetensors")  # a file type keeps NaN


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is empty"),
        (b"not a checkpoint", "could not be read as a checkpoint"),
        (dumped({"a": Call(print, "code")}), "could not be read as a checkpoint"),
        (None, "it holds no tensors"),
        ({"a": torch.eye(2).to_sparse()}, "only dense tensors can be converted, it has others: a"),
    ],
)
def test_damaged_and_hostile_sources(tmp_path, capsys, content, text):
    path = tmp_path / "m.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content or {"epoch": 3}, path)
    with pytest.raises(CheckpointError, match=text):
        convert_checkpoint(path, tmp_path / "n.pth")
    assert capsys.readouterr().out == "" and unchanged(tmp_path, "m.pth")


def test_dtypes_that_a_file_type_lacks(tmp_path):
    path = saved(tmp_path / "m.pth", {"weight": torch.zeros(2, 2).to(torch.float8_e5m2)})
    with pytest.raises(CheckpointError, match=r"\.pdparams files cannot hold weight of float8_e5m2"):
        convert_checkpoint(path, tmp_path / "n.pdparams")
    assert unchanged(tmp_path, "m.pth")


def test_paddles_reader_checks_what_the_writer_writes(tmp_path):
    """The call that the writer uses is no way around the reader's checks."""

    for arguments, text in (
        (((2, 2), "<f4", b"\0" * 8), r"an array of shape \(2, 2\) in 8 bytes"),
        (((2,), "O", b"\0" * 16), "which is no number"),
        (((2, 2), "<f4", None), "an array of something else than bytes"),
        (((2, 2), "<f4", b"\0" * 16, 0, (0, 0)), r"only dicts of arrays are read"),
    ):
        (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"a": Call(np.ndarray, *arguments)}, 4))
        with pytest.raises(CheckpointError, match=text):
            read_state_dict(tmp_path / "m.pdparams")


# ---- the command


def test_the_command(tmp_path, file, capsys):
    target = tmp_path / "n.safetensors"
    code, out, err = run(capsys, "convert", file, target)
    assert code == 0 and not err and "bit for bit" in out
    for argv, expected, text in (
        ((), 1, "n.safetensors exists"),
        (("--overwrite", "--to", "timm"), 1, "give model=NAME"),
        (("--overwrite", "--to", "timm", "--model", "t2t_vit_7"), 1, "does not fit"),
        (("--img-size", "1", "2", "3"), 2, "a side or H W"),
    ):
        code, out, err = run(capsys, "convert", file, target, *argv)
        assert code == expected and not out and text in err and err.startswith("t2t-fast: error: ")
    assert run(capsys, "convert", tmp_path / "no.pth", tmp_path / "x.pth")[0] == 1
    assert run(capsys, "convert", file, tmp_path / "x.pth", "--to", "keras")[0] == 2


def test_the_commands_choices_are_the_functions():
    assert CHOICES == module.TARGETS


@pytest.mark.slow
def test_the_command_on_a_whole_model(tmp_path, capsys):
    """T2T-ViT-7 is found by its shapes; options reach the function."""
    model = t2t_fast.create_model("t2t_vit_7", num_classes=3)
    path = saved(tmp_path / "m.pth", {"state_dict": model.state_dict(), "state_dict_ema": model.state_dict()})
    options = ("--to", "paddle", "--qk-scale", "0.2", "--no-ema", "--no-head", "--img-size", "224")
    code, out, err = run(capsys, "convert", path, tmp_path / "n.pdparams", *options)
    assert code == 0 and not err, err
    assert "(state_dict, upstream's names)" in out and "left out" in out
    assert "t2t_vit_7 computes the same logits from both files, largest error 0.0e+00" in out
