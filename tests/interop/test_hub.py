"""``save_pretrained``, ``from_pretrained``, ``push_to_hub``: folders, the hub, offline, foreign and broken content."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import t2t_fast
from support import ROOT
from support.checkpoints import resized_table, same
from t2t_fast import reference
from t2t_fast.errors import CheckpointError

OPTIONS = dict(embed_dim=48, depth=2, num_heads=3, token_dim=32, img_size=(64, 96), num_classes=10)


def tiny(name="t2t_vit_14", **options):
    return t2t_fast.create_model(name, **{**OPTIONS, **options})


def edit(folder, **changes):
    """Change keys of a folder's ``config.json``; ``None`` removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def folder(tmp_path):
    return t2t_fast.save_pretrained(tiny(), tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t2t_vit_14", dict(qk_scale=0.2, drop_path_rate=0.1, in_chans=1)),
        ("t2t_vit_t_14", dict(num_classes=0)),
        ("t2t_vit_14_se", {}),
        ("t2t_vit_dense", dict(block_config=(2, 1), embed_dim=32, growth_rate=16, num_heads=4)),
        ("vit_deit_tiny_distilled_patch16_224", dict(token_dim=None)),
    ],
)
def test_a_folder_and_back(tmp_path, name, options):
    options = {key: value for key, value in {**OPTIONS, **options}.items() if value is not None}
    if name == "t2t_vit_dense":
        del options["depth"]
    source = t2t_fast.create_model(name, **options).eval()
    t2t_fast.save_pretrained(source, tmp_path / "a" / "model")
    model = t2t_fast.from_pretrained(tmp_path / "a" / "model")
    assert type(model) is type(source) and not model.training
    assert same(model, source.state_dict())
    x = torch.randn(1, options.get("in_chans", 3), 64, 96)
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
    again = t2t_fast.save_pretrained(model, tmp_path / "b")
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (again / file).read_bytes() == (tmp_path / "a" / "model" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_config_has_timms_keys(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "t2t_vit_14" and config["num_classes"] == 10
    assert config["model_args"]["img_size"] == [64, 96] and config["model_args"]["num_classes"] == 10
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 96] and config["pretrained_cfg"]["classifier"] == ["head"]
    assert (config["library_name"], config["library_version"]) == ("t2t_fast", t2t_fast.__version__)
    hub = pytest.importorskip("timm", reason="timm is not installed").models._hub
    pretrained, name, options = hub.load_model_config_from_path(folder)
    assert name == "t2t_vit_14" and options["embed_dim"] == 48 and tuple(pretrained["input_size"]) == (3, 64, 96)
    assert hub.load_state_dict_from_path(folder).keys() == tiny().state_dict().keys()


def test_plain_vits_have_other_names_in_timm(tmp_path):
    model = t2t_fast.create_model("vit_small_patch16_224", embed_dim=48, depth=1, img_size=32)
    folder = t2t_fast.save_pretrained(model, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "t2t_paper_vit_small_patch16_224"
    assert same(t2t_fast.from_pretrained(folder), model.state_dict())


@pytest.mark.parametrize("name", ["t2t_vit_14", "vit_small_patch16_224"])
def test_timm_reads_and_writes_folders(tmp_path, name):
    pytest.importorskip("t2t_fast.timm", reason="the models are not registered in timm")
    timm = pytest.importorskip("timm")
    options = {key: value for key, value in OPTIONS.items() if key != "token_dim" or name == "t2t_vit_14"}
    source, x = t2t_fast.create_model(name, **options).eval(), torch.randn(1, 3, 64, 96)
    t2t_fast.save_pretrained(source, tmp_path / "ours")
    model = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
    timm.models.save_for_hf(model, tmp_path / "timms", safe_serialization=True)
    assert same(t2t_fast.from_pretrained(tmp_path / "timms"), source.state_dict())


def test_folders_that_timm_wrote(folder):
    """timm writes no dtype and no library, and model_args only if there are any."""
    edit(
        folder, dtype=None, library_name=None, library_version=None, model_args=dict(embed_dim=48, depth=2, num_heads=3)
    )
    with pytest.raises(CheckpointError, match="does not fit the model"):
        t2t_fast.from_pretrained(folder)  # token_dim is missing
    model = t2t_fast.from_pretrained(folder, token_dim=32)
    assert model.grid_size == (4, 6) and model.num_classes == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(tmp_path, dtype):
    source = tiny().to(dtype)
    model = t2t_fast.from_pretrained(t2t_fast.save_pretrained(source, tmp_path / "model"))
    assert model.head.weight.dtype == dtype and same(model, source.state_dict())


def test_mixed_dtypes_lose_nothing(tmp_path):
    source = tiny().half()
    source.norm.bfloat16()
    model = t2t_fast.from_pretrained(t2t_fast.save_pretrained(source, tmp_path / "model"))
    assert same(model, {name: value.float() for name, value in source.state_dict().items()})


def test_options_override_the_saved_ones(folder):
    source = t2t_fast.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"no head of 4 classes, so head\.weight, head\.bias are newly initialised"):
        model = t2t_fast.from_pretrained(folder, num_classes=4, img_size=64, drop_path_rate=0.2)
    assert model.head.out_features == 4 and model.grid_size == (4, 4)
    expected = resized_table(source.pos_embed.data, (4, 6), (4, 4))
    torch.testing.assert_close(model.pos_embed.data, expected)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    with pytest.raises(CheckpointError, match="does not fit"):
        t2t_fast.from_pretrained(folder, in_chans=1)
    with pytest.raises(TypeError, match="colour"):
        t2t_fast.from_pretrained(folder, colour="red")


def test_fine_tuned_heads_are_saved(tmp_path, folder):
    model = tiny()
    model.reset_classifier(4)
    assert t2t_fast.from_pretrained(t2t_fast.save_pretrained(model, tmp_path / "a")).head.out_features == 4
    model.head = nn.Linear(48, 7)  # by hand: num_classes is stale
    assert t2t_fast.from_pretrained(t2t_fast.save_pretrained(model, tmp_path / "b")).num_classes == 7
    t2t_fast.load_checkpoint(model, folder / "model.safetensors", num_classes=0)
    assert t2t_fast.from_pretrained(t2t_fast.save_pretrained(model, tmp_path / "c")).num_classes == 0


def test_wrapped_models_are_saved_without_the_wrapper(tmp_path):
    model = tiny()
    for index, wrapped in enumerate((nn.DataParallel(model), torch.compile(model))):
        folder = t2t_fast.save_pretrained(wrapped, tmp_path / str(index))
        assert same(t2t_fast.from_pretrained(folder), model.state_dict())


def upstream():
    return reference.T2T_ViT(img_size=64, embed_dim=48, depth=1, num_heads=3, token_dim=32)


def swapped():
    model = upstream()
    t2t_fast.swap(model)
    return model


def with_adapter():
    model = tiny()
    model.blocks[0].attn.adapter = nn.Linear(48, 2)
    return model


def headed(head):
    model = tiny()
    model.head = head
    return model


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: 3, TypeError, "model must be a torch.nn.Module, got int"),
        (upstream, ValueError, r"must be built by t2t_fast\.create_model.* got T2T_ViT; .*convert_checkpoint"),
        (swapped, ValueError, r"must be built by t2t_fast\.create_model"),
        (lambda: t2t_fast.T2TViT(img_size=64, embed_dim=48, depth=1, num_heads=3), ValueError, "must be built by"),
        (with_adapter, ValueError, r"missing, unexpected or of another shape: blocks\.0\.attn\.adapter\.weight, "),
        (lambda: headed(nn.Linear(48, 5, bias=False)), ValueError, r"another shape: head\.bias"),
        (
            lambda: headed(nn.Sequential()),
            ValueError,
            r"model\.head must be nn\.Linear or nn\.Identity, got Sequential",
        ),
        (
            lambda: tiny(norm_layer=partial(nn.LayerNorm, eps=1e-6)),
            TypeError,
            r"norm_layer must be a number, .*config\.json, got functools\.partial",
        ),
        (lambda: tiny().to("meta"), ValueError, "must have memory, got tensors on the meta device"),
    ],
    ids=["no module", "upstream", "swapped", "class", "adapter", "no bias", "head", "norm_layer", "meta"],
)
def test_models_that_cannot_be_saved(tmp_path, monkeypatch, build, error, text):
    model = build()
    with pytest.raises(error, match=f"^save_pretrained: .*{text}"):
        t2t_fast.save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    hub(monkeypatch, tmp_path)
    with pytest.raises(error, match=f"^push_to_hub: .*{text}"):
        t2t_fast.push_to_hub(model, "me/model")
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"folder must be a directory, .*file is a file"):
        t2t_fast.save_pretrained(tiny(), tmp_path / "file")
    with pytest.raises(TypeError, match=r"folder must be a str or an os\.PathLike, got int"):
        t2t_fast.save_pretrained(tiny(), 3)
    folder = t2t_fast.save_pretrained(tiny(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        t2t_fast.save_pretrained(tiny(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_a_card_that_exists_is_kept(folder):
    assert "t2t_vit_14" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    t2t_fast.save_pretrained(tiny(depth=1), folder)
    assert (folder / "README.md").read_text() == "mine"
    assert len(t2t_fast.from_pretrained(folder).blocks) == 1


def without(name):
    return lambda folder: (folder / name).unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (without("config.json"), FileNotFoundError, r"it lacks config\.json"),
        (without("model.safetensors"), FileNotFoundError, r"must have config\.json and model\.safetensors, it lacks"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, r"config\.json: it is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), CheckpointError, "it is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), CheckpointError, "architecture must be one of"),
        (partial(edit, architecture="resnet50"), CheckpointError, "architecture must be one of .* got 'resnet50'"),
        (partial(edit, architecture={}), CheckpointError, "architecture must be one of"),
        (partial(edit, dtype="int8"), CheckpointError, "dtype must be one of float32, .* got 'int8'"),
        (partial(edit, model_args=[1]), CheckpointError, "model_args and pretrained_cfg must be objects"),
        (partial(edit, model_args={"colour": 1}), CheckpointError, "does not describe a model: .*colour"),
        (partial(edit, model_args={"depth": "2"}), CheckpointError, "does not describe a model: .*depth"),
        (partial(edit, model_args={"embed_dim": 2**20, "num_heads": 1}), CheckpointError, "describes a t2t_vit_14 of"),
        (partial(edit, model_args={}), CheckpointError, "describes a t2t_vit_14 of"),
        (partial(edit, model_args={**OPTIONS, "depth": 1}), CheckpointError, r"unexpected +\d+ +blocks\.1\."),
        (truncated, CheckpointError, r"model\.safetensors could not be read"),
    ],
)
def test_broken_folders(folder, damage, error, text):
    damage(folder)
    with pytest.raises(error, match=text):
        t2t_fast.from_pretrained(folder)


def test_a_pickle_is_not_read(folder):
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"it lacks model\.safetensors"):
        t2t_fast.from_pretrained(folder)


def test_sources_that_are_no_folder(tmp_path, folder):
    with pytest.raises(TypeError, match=r"source must be a str or an os\.PathLike, got int"):
        t2t_fast.from_pretrained(3)
    with pytest.raises(ValueError, match=r"is a file; create_model\(NAME, checkpoint=FILE\) takes it"):
        t2t_fast.from_pretrained(folder / "model.safetensors")
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "nowhere", "./a/b"):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .* it is no OWNER/NAME"):
            t2t_fast.from_pretrained(source)


def hub(monkeypatch, folder):
    """Replace the hub's interface by one that copies into ``folder``. Returns the list of its calls."""
    calls = []

    class Api:
        def __init__(self, token=None, **_):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append(("upload_folder", repo_id, options))
            shutil.copytree(folder_path, folder / repo_id)
            return f"hub://{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    return calls


def test_upload_and_download(tmp_path, monkeypatch):
    calls = hub(monkeypatch, tmp_path / "hub")
    source = tiny()
    address = t2t_fast.push_to_hub(source, "me/model", private=True, token="secret", branch="dev", create_pr=True)
    assert address == "hub://me/model/commit/1"
    assert [call[0] for call in calls] == ["token", "create_repo", "upload_folder"]
    assert calls[0][1] == "secret" and calls[1][2]["private"] is True
    uploaded = calls[2][2]
    assert uploaded["revision"] == "dev" and uploaded["create_pr"] and uploaded["commit_message"] == "Upload t2t_vit_14"
    repository = tmp_path / "hub" / "me" / "model"
    assert sorted(path.name for path in repository.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (repository / "README.md").read_text().startswith("---\nlibrary_name: t2t_fast\n")

    asked = []

    def download(repo_id, filename, **options):
        asked.append((filename, options["revision"], options["token"], options["local_files_only"]))
        return str(tmp_path / "hub" / repo_id / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    model = t2t_fast.from_pretrained("me/model", revision="dev", token="secret", local_files_only=True)
    assert same(model, source.state_dict())
    assert asked == [(name, "dev", "secret", True) for name in ("config.json", "model.safetensors")]


@pytest.mark.slow
def test_offline(tmp_path):
    """Without a network: repositories of the cache load, others are an error, folders need no hub."""
    folder = t2t_fast.save_pretrained(tiny(depth=1), tmp_path / "model")
    cache = tmp_path / "cache" / "models--me--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    code = (
        "import sys, t2t_fast\n"
        "assert 'huggingface_hub' not in sys.modules and 'safetensors' not in sys.modules\n"
        f"cache = {str(tmp_path / 'cache')!r}\n"
        f"assert len(t2t_fast.from_pretrained({str(folder)!r}).blocks) == 1\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "assert len(t2t_fast.from_pretrained('me/model', cache_dir=cache).blocks) == 1\n"
        "try: t2t_fast.from_pretrained('me/other', cache_dir=cache)\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the hub did not provide config.json and model.safetensors of me/other" in done.stdout


def test_missing_packages(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"push_to_hub needs huggingface_hub: pip install 't2t_fast\[hub\]'"):
        t2t_fast.push_to_hub(tiny(), "me/model")
    with pytest.raises(ImportError, match=r"the hub needs huggingface_hub: pip install 't2t_fast\[hub\]'"):
        t2t_fast.from_pretrained("me/model")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 't2t_fast\[checkpoints\]'"):
        t2t_fast.save_pretrained(tiny(), folder)
    assert Path(folder / "model.safetensors").is_file()
