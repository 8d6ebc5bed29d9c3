"""timm's registry: ``import t2t_fast.timm``, then ``timm.create_model("t2t_vit_14", ...)``.

Registered are the models of :func:`t2t_fast.list_models`: T2T-ViTs under their own names, the paper's plain ViTs as
``t2t_paper_...``, since timm has other models under their names. ``python -m t2t_fast.timm SCRIPT ...`` runs a script,
such as timm's ``validate.py``, with the models registered.
"""

from __future__ import annotations

import argparse
import math
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from .errors import CheckpointError, check_bool, check_pair
from .interop.checkpoints import read_state_dict
from .interop.checkpoints.fit import Fit
from .interop.checkpoints.report import Refused
from .interop.hub import timm_name
from .models import CONFIGS, ViT, build_model
from .models.blocks import BLOCKS
from .models.patch import PatchEmbed
from .modules import T2TModule
from .ops._common.spec import grid_after

__all__: list[str] = ["checkpoint_filter_fn"]

_RELEASES = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"
_FILES = {
    "t2t_vit_7.yitu_in1k": "71.7_T2T_ViT_7.pth.tar",
    "t2t_vit_10.yitu_in1k": "75.2_T2T_ViT_10.pth.tar",
    "t2t_vit_12.yitu_in1k": "76.5_T2T_ViT_12.pth.tar",
    "t2t_vit_14.yitu_in1k": "81.5_T2T_ViT_14.pth.tar",
    "t2t_vit_14.yitu_in1k_384": "83.3_T2T_ViT_14.pth.tar",
    "t2t_vit_19.yitu_in1k": "81.9_T2T_ViT_19.pth.tar",
    "t2t_vit_24.yitu_in1k": "82.3_T2T_ViT_24.pth.tar",
    "t2t_vit_t_14.yitu_in1k": "81.7_T2T_ViTt_14.pth.tar",
    "t2t_vit_t_19.yitu_in1k": "82.4_T2T_ViTt_19.pth.tar",
    "t2t_vit_t_24.yitu_in1k": "82.6_T2T_ViTt_24.pth.tar",
}
_FIRST = {
    "performer": "tokens_to_token.attention1.kqv",
    "transformer": "tokens_to_token.attention1.attn.qkv",
    "convolution": "tokens_to_token.soft_split0",
}
"""Kind of tokens -> the layer whose input has the image's channels."""


def _cfg(name: str, **options: Any) -> dict[str, Any]:
    """timm's description of a model of this package: images, layers, source. Values are those of upstream's code."""
    config = CONFIGS[name]
    plain = issubclass(config["cls"], ViT)
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": True,  # timm's scripts then build the model for the size of their images
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "first_conv": "patch_embed.proj" if plain else _FIRST[config.get("tokens_type", "performer")],
        "classifier": ("head", "head_dist") if config.get("distilled") else "head",
        "paper_name": "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet",
        "paper_ids": "arXiv:2101.11986",
        "origin_url": "https://github.com/yitu-opensource/T2T-ViT",
        **options,
    }


def _default_cfgs() -> dict[str, dict[str, Any]]:
    cfgs = {
        tagged: _cfg(
            tagged.partition(".")[0],
            url=_RELEASES + file,
            license="bsd-3-clause-clear",
            **({"input_size": (3, 384, 384)} if tagged.endswith("_384") else {}),
        )
        for tagged, file in _FILES.items()
    }
    released = {tagged.partition(".")[0] for tagged in _FILES}
    return {**cfgs, **{timm_name(name): _cfg(name) for name in CONFIGS if name not in released}}


default_cfgs = generate_default_cfgs(_default_cfgs())


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as ``model.load_state_dict`` takes them; ``model`` stays unchanged.

    Reads what :func:`t2t_fast.load_checkpoint` reads: averaged weights, names of wrappers and other projects, position
    tables of other grids. A first layer for another number of channels is adapted by timm's rule: the weights are
    summed up for one channel, else repeated and scaled.

    Args:
        state_dict: a state dict, or a dict that contains one.
        model: a model of this package.

    Returns:
        name -> tensor, without the head if that has another number of classes or no counterpart.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    state, source = read_state_dict(state_dict)
    try:
        state = _adapt_channels(state, model)
        fit = Fit(
            model,
            state,
            num_classes=model.num_classes,
            source_grid=_source_grid(state, model),
            grid=None,
            trained_with=None,
            transposed=False,
        )
    except Refused as error:
        raise CheckpointError(f"checkpoint_filter_fn: {error}") from error
    report = fit.report("state dict", source)
    if report.loaded == 0 or not report.complete:
        lines = ["checkpoint_filter_fn: the checkpoint does not fit the model", *report.problems(), *fit.hints(report)]
        raise CheckpointError("\n".join(lines))
    return {name: value for name, value in fit.copies.items() if name not in report.reinitialised}


def _source_grid(state: Mapping[str, torch.Tensor], model: Any) -> tuple[int, int] | None:
    """The grid of the checkpoint's position table, if the size of its images is known and accounts for all entries."""
    table = state.get("pos_embed")
    size = getattr(model, "pretrained_model_args", {}).get("img_size") or model.pretrained_cfg["input_size"][1:]
    grid = grid_after(model.windows, *check_pair("checkpoint_filter_fn", "img_size", size, minimum=1))
    known = table is not None and table.ndim == 3 and table.shape[1] == model.num_prefix_tokens + math.prod(grid)
    return grid if known else None


def _adapt_channels(state: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The state with a first layer for the model's channels: its convolution, or its LayerNorm and Linear."""
    first, taps = model.pretrained_cfg["first_conv"], model.windows[0].taps
    channels, wanted = model.pretrained_cfg["input_size"][0], model.in_chans
    norms = [f"tokens_to_token.attention1.norm1.{part}" for part in ("weight", "bias")]
    adapted = dict(state)
    for name in (f"{first}.weight", *norms) if wanted != channels else ():
        value = state.get(name)
        if value is not None and value.shape[-1] == channels * taps:  # columns of an unfolded image, channel by channel
            value = adapt_input_conv(wanted, value.reshape(-1, channels, taps, 1), channels).flatten(1)
            adapted[name] = value[0] * (wanted / channels) if name in norms else value  # a norm's are not summed up
        elif value is not None and value.ndim == 4 and value.shape[1] == channels:
            adapted[name] = adapt_input_conv(wanted, value, channels)
    return adapted


def _make(name: str, dynamic_img_size: bool = True, **options: Any) -> nn.Module:
    """A model of this package with timm's arguments; it takes images of any size whatever ``dynamic_img_size``."""
    check_bool(name, "dynamic_img_size", dynamic_img_size)
    model = build_model(name, **options)
    if isinstance(model, ViT):
        model.set_distilled_training(False)  # timm's scripts take one tensor; its distillation task turns this on
    return model


def _build(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """:func:`timm.create_model`'s work for one model: build it, load it, wrap it for ``features_only``."""
    registered = timm_name(name)
    source = resolve_pretrained_cfg(registered, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay"))
    remedy = f"give a local file: pretrained=True, pretrained_cfg_overlay=dict(file=PATH); files are at {_RELEASES}"
    if pretrained and not (source.has_weights or source.state_dict):
        raise RuntimeError(f"{registered}: pretrained=True, but no weights of this model were published; {remedy}")
    pyramid = not issubclass(CONFIGS[name]["cls"], ViT) and options.get("tokens_type") != "patch"
    feature_cfg = {"feature_cls": "getter", "out_indices": (0, 1, -1) if pyramid else 3}
    try:
        # Upstream's and timm's checkpoints contain the command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return build_model_with_cfg(
                partial(_make, name),
                registered,
                pretrained,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg={**feature_cfg, **options.pop("feature_cfg", {})},
                **options,
            )
    except OSError as error:
        origin = source.file or source.url or source.hf_hub_id
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise RuntimeError(f"{registered}: pretrained=True could not read {origin} ({reason}); {remedy}") from error


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _build(name, pretrained, **options)

    create.__name__ = create.__qualname__ = timm_name(name)
    create.__module__ = __name__
    create.__doc__ = f"``{name}`` of :func:`t2t_fast.create_model`, with timm's arguments."
    return create


def _register() -> None:
    for layer in (T2TModule, PatchEmbed, *BLOCKS.values()):  # their forwards depend on sizes
        register_notrace_module(layer)
    for name in CONFIGS:
        create = _entry_point(name)
        if is_model(create.__name__):
            warnings.warn(
                f"t2t_fast.timm: timm already has a model {create.__name__}, which stays; t2t_fast.create_model makes "
                "the one of this package",
                stacklevel=3,
            )
        else:
            globals()[create.__name__] = register_model(create)


def _main(arguments: list[str]) -> None:
    """Run a script with the models registered."""
    if not arguments:
        raise SystemExit("usage: python -m t2t_fast.timm SCRIPT [ARGUMENTS OF THE SCRIPT]")
    import t2t_fast.timm  # noqa: F401  (this module is __main__ now, so it is imported again under its name)

    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1:])
elif __name__ == "t2t_fast.timm":
    _register()
