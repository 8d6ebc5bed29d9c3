"""The reference models and the fast models reproduce every golden number of the upstream models.

The quick tests run each kind of model once; `-m slow` adds the full-size models.
"""

import json

import numpy as np
import pytest
import torch

from support import families, golden
from t2t_fast import backend, models, reference
from t2t_fast.models.position import resize_position_table, sinusoid_table
from t2t_fast.reference import vit as reference_vit

# Relative to the largest value. The files are float32 roundings of float64 results (6e-8); gradients accumulate.
FP64_FORWARD, FP64_BACKWARD = 3e-7, 1e-6
# Times the upstream's own float32 error. Measured: forward at most 2.6, sampled tokens at most 3.5.
FP32_FACTOR = 6
# Relative error of a whole gradient in float32. Measured: at most 1.1e-5.
FP32_BACKWARD = 5e-5

MODELS = [name for name, case in golden.cases().items() if "function" not in case]
FAMILIES = ["reference", "fast"]
# The reference models take square images only. Of models that differ only in depth, one is enough.
DEEPER = ("_10", "_12", "_19", "_24", "_t_19", "_t_24", "_img384", "_base_patch16_224")
# Full-size models are slow. Each kind of model has a tiny case, except resnext and wide.
FULL = [name for name in MODELS if golden.cases()[name]["input"][-1] >= 224 and "t2t_module" not in name]
QUICK = [
    ("reference", "official_t2t_vit_7"),
    *(("fast", f"official_{name}") for name in ("t2t_vit_7", "t2t_vit_14_resnext", "t2t_vit_14_wide")),
    ("float32", "official_t2t_vit_7"),
]


def marked(form, name):
    return pytest.mark.slow if name in FULL and (form, name) not in QUICK else ()


FAMILY_MODELS = [
    pytest.param(family, name, marks=marked(family, name))
    for name in MODELS
    for family in FAMILIES
    if family == "fast"
    or not (name.endswith(DEEPER) or "_t_19_" in name or "_t_24_" in name or "64x96" in name or "avg_nocls" in name)
]


def outputs(result):
    return list(result) if isinstance(result, (list, tuple)) else [result]


def expected_outputs(data):
    return [data["out"]] if "out" in data else [data[f"out{i}"] for i in range(2)]


def prepared(name, family, dtype):
    case = golden.cases()[name]
    built = families.build(case, family)
    golden.fill(built.model, case, built.upstream_key)
    return case, golden.arrays(case), built, built.model.to(dtype).eval()


@pytest.mark.parametrize(("family", "name"), FAMILY_MODELS)
def test_forward_and_gradients_in_float64(family, name):
    case, data, built, model = prepared(name, family, torch.float64)
    assert golden.weights_crc32(model, case, built.upstream_key) == case["weights_crc32"]

    seen = {}
    if "block_norm" in data:
        for index, block in enumerate(model.get_submodule(built.blocks)):
            block.register_forward_hook(lambda _m, _i, out, index=index: seen.__setitem__(index, out.norm().item()))
    if "tokens_norm" in data:
        hook = lambda _m, _i, out: seen.__setitem__("tokens", out)  # noqa: E731
        model.get_submodule(built.tokens).register_forward_hook(hook)
    if "features" in data:
        head = model.get_submodule("head" if hasattr(model, "head") else "mlp_head")
        head.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("features", inputs[0]))

    x = golden.make_input(case).requires_grad_()
    result = built.call(x)
    for out, expected in zip(outputs(result), expected_outputs(data), strict=True):
        assert out.shape == expected.shape
        assert np.abs(out.detach().numpy() - expected).max() <= FP64_FORWARD * np.abs(expected).max()
    if "block_norm" in data:
        norms = np.array([seen[index] for index in range(len(data["block_norm"]))])
        np.testing.assert_allclose(norms, data["block_norm"], rtol=FP64_FORWARD)
    if "features" in data:
        np.testing.assert_allclose(seen["features"].detach().numpy(), data["features"], rtol=0, atol=3e-6)
    if "tokens_norm" in data and "tokens" in seen:
        check_tokens(case, data, seen["tokens"], FP64_FORWARD)
    if "grad_keys" in data:
        golden.loss_of(case, result).backward()
        gradients = {built.upstream_key(key): p.grad for key, p in model.named_parameters()}
        gradients["input"] = x.grad
        golden.check_gradients(case, data, gradients.get, FP64_BACKWARD)


def check_tokens(case, data, tokens, rtol):
    assert tuple(tokens.shape) == tuple(data["tokens_shape"])
    sample = (data[f"tokens_{part}"] for part in ("norm", "dot", "idx", "val"))
    golden.check_sample(case, "dot:tokens", tokens, *sample, rtol, "tokens")


@pytest.mark.parametrize("name", [pytest.param(name, marks=marked("float32", name)) for name in MODELS])
def test_fast_models_in_float32(name, fused):
    """Forward within a small multiple of upstream's own float32 error; gradients within a fixed relative error."""
    case, data, built, model = prepared(name, "fast", torch.float32)
    x = golden.make_input(case, torch.float32).requires_grad_()
    with backend("auto" if fused == "native" else fused):
        result = built.call(x)
    for out, expected in zip(outputs(result), expected_outputs(data), strict=True):
        assert np.abs(out.detach().double().numpy() - expected).max() <= FP32_FACTOR * case["f32_max_abs_err"]
    if "grad_keys" in data:
        golden.loss_of(case, result).backward()
        gradients = {built.upstream_key(key): p.grad for key, p in model.named_parameters()}
        gradients["input"] = x.grad
        golden.check_gradients(case, data, gradients.get, FP32_BACKWARD)


KEY_TABLES = {
    "lanl_t2t_vit_400x100_k733": lambda f: families.LANL[f]["t2t_vit:T2T_ViT"](
        img_size=(1, 400, 100), softsplit_kernels=(7, 3, 3)
    ),
    "lanl_t2t_vit_default": lambda f: families.LANL[f]["t2t_vit:T2T_ViT"](),
    "lanl_vit_model_default": lambda f: families.LANL[f]["vit:ViT_Model"](),
    "official_t2t_module_convolution": lambda f: families.OFFICIAL[f]["t2t_vit:T2T_module"](tokens_type="convolution"),
    "vitpytorch_t2tvit_readme": lambda f: families.vit_pytorch.T2TViT(
        f, dim=512, image_size=224, depth=5, heads=8, mlp_dim=512, num_classes=1000
    ),
}


def build_for_key_table(name, family):
    if name in KEY_TABLES:
        return KEY_TABLES[name](family), lambda key: key
    upstream, _, model = name.partition("_")
    if upstream == "mmpretrain":
        case = golden.cases()[f"{name}_scale_corrected"]
        built = families.build(case, family)
        return built.model, built.upstream_key
    if family == "fast":
        return models.build_model(model), lambda key: key
    return (getattr(reference, model, None) or getattr(reference_vit, model))(), lambda key: key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", golden.key_table_names())
def test_parameter_names_shapes_and_order(name, family):
    """state_dict keys, shapes and trainability equal upstream's, in upstream's order (optimizer states follow it)."""
    table = golden.key_table(name)
    with torch.device("meta"):
        model, upstream_key = build_for_key_table(name, family)
    trainable = {upstream_key(key): p.requires_grad for key, p in model.named_parameters()}
    ours = {upstream_key(key): list(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: entry["shape"] for key, entry in table["tensors"].items()}
    assert ours == theirs
    for key, entry in table["tensors"].items():
        if entry["kind"] == "parameter":
            assert trainable[key] == entry["trainable"], key
    if name.startswith(("official", "lanl")):
        assert list(ours) == list(theirs)
        assert sum(p.numel() for p in model.parameters()) == table["params_total"]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == table["params_trainable"]


@pytest.mark.parametrize("name", [n for n, c in golden.cases().items() if c.get("function") == "sinusoid"])
def test_sinusoid_tables(name):
    case = golden.cases()[name]
    table = sinusoid_table(*case["args"])
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), golden.arrays(case)["out"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, c in golden.cases().items() if c.get("function") == "resize_pos_embed"])
def test_position_table_resizing(name):
    case = golden.cases()[name]
    table = golden.make_input(case)
    mode = "bilinear" if "bilinear" in name else "bicubic"
    if case["upstream"] == "mmpretrain":
        old, new = map(tuple, case["args"])
    else:
        old = (round((table.shape[1] - 1) ** 0.5),) * 2
        new = tuple(case["kwargs"].get("gs_new", (round((case["args"][0] - 1) ** 0.5),) * 2))
    resized = resize_position_table(table, old, new, mode=mode)
    np.testing.assert_allclose(resized.numpy(), golden.arrays(case)["out"], rtol=0, atol=1e-6)


def test_count_tokens():
    data = json.loads((golden.FOLDER / "lanl_count_tokens.json").read_text())
    for module in (reference.lanl, models.lanl):
        for entry in data["count_tokens"]:
            assert list(module.count_tokens(*entry["args"])) == entry["result"]
    for entry in data["tokens2token"]:
        for module in (reference.lanl, models.lanl):
            with torch.device("meta"):
                layer = module.Tokens2Token(tuple(entry["img_size_chw"]), tuple(entry["kernels"]))
            assert layer.num_tokens == entry["num_tokens"]
