"""Parameter names of other projects, translated into upstream's."""

import re

# Rules of mmpretrain's ``T2T_ViT`` (backbone keys, after the classifier's ``backbone.`` is gone), in order.
_MMPRETRAIN = (
    (re.compile(r"^encoder\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"\.ln([12])\."), r".norm\1."),
    (re.compile(r"\.ffn\.layers\.0\.0\."), ".mlp.fc1."),
    (re.compile(r"\.ffn\.layers\.1\."), ".mlp.fc2."),
    (re.compile(r"^head\.layers\.head\."), "head."),
)


def strip_wrappers(state):
    """A state dict without the prefixes that DataParallel and torch.compile add; equal names fall together."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def _mmpretrain(key):
    key = key.removeprefix("backbone.")
    for pattern, replacement in _MMPRETRAIN:
        key = pattern.sub(replacement, key)
    return key


def to_upstream(state):
    """A state dict under upstream's names, and whose names it had: "upstream" or "mmpretrain".

    mmpretrain's published ``t2t-vit-t-*`` weights are the official ones renamed (and carry the official numbers with
    the documented attention scale). Everything that is not mmpretrain's comes back as it is.
    """
    names = {key.removeprefix("backbone.") for key in state}
    if "encoder.0.ln1.weight" in names and "tokens_to_token.project.weight" in names:
        return {_mmpretrain(key): value for key, value in state.items()}, "mmpretrain"
    return state, "upstream"
