"""What projects call the weights of T2T-ViT: one table, used to read names and to write them.

Sources of the names: tests/golden/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...models import FAMILIES
from .report import Refused, listed

_LINEAR = r"\.(weight|bias)"
_LAYER = rf"(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]){_LINEAR}"
_VIT = rf"cls_token|pos_embed|(norm|head){_LINEAR}|blocks\.\d+\.{_LAYER}"
_TRANSFORMER = rf"tokens_to_token\.(attention[12]\.{_LAYER}|project{_LINEAR})"
_PERFORMER = rf"tokens_to_token\.attention[12]\.(w|(norm[12]|kqv|proj|mlp\.[02]){_LINEAR})"


@dataclass(frozen=True)
class Project:
    """A project's names for upstream's weights.

    Attributes:
        sign: regular expression that is found in names of its state dicts, and in no other project's.
        names: (upstream's part of a name, the project's), whole dotted parts; ``#`` stands for a number.
        takes: regular expression of the names, in upstream's terms, that the project's network has.
        network: what ``takes`` describes, for messages; for a project with another network, the class that its weights
            fit.
        backbone: prefix of all names but the head's, if there is a head.
        other: its network is not upstream's, so its weights fit no other project.
    """

    sign: str
    names: tuple[tuple[str, str], ...] = ()
    takes: str = ".*"
    network: str = ""
    backbone: str = ""
    other: bool = False


PROJECTS: dict[str, Project] = {
    "mmpretrain": Project(
        sign=r"(?<![^.])encoder\.0\.ln1\.",
        names=(
            ("blocks.#.", "encoder.#."),
            ("norm1.", "ln1."),
            ("norm2.", "ln2."),
            ("mlp.fc1.", "ffn.layers.0.0."),
            ("mlp.fc2.", "ffn.layers.1."),
            ("head.", "head.layers.head."),
        ),
        takes=f"{_VIT}|{_TRANSFORMER}",
        network="mmpretrain's T2T_ViT (transformer tokens, plain blocks)",
        backbone="backbone.",
    ),
    "paddle": Project(
        sign=r"(?<![^.])patch_embed\.attn[12]\.",
        names=(
            ("tokens_to_token.attention#.", "patch_embed.attn#."),
            ("tokens_to_token.project.", "patch_embed.proj."),
        ),
        takes=f"{_VIT}|{_TRANSFORMER}|{_PERFORMER}",
        network="PaddleViT's T2TViT (performer or transformer tokens, plain blocks)",
    ),
    "timm": Project(
        sign=r"(?<![^.])patch_embed\.tokens_to_token\.",
        names=(("tokens_to_token.", "patch_embed.tokens_to_token."),),
        takes=rf"{_VIT}|dist_token|head_dist{_LINEAR}|patch_embed\.proj{_LINEAR}|tokens_to_token\..*",
        network="timm's VisionTransformer (plain blocks)",
    ),
    "vit-pytorch": Project(
        sign=r"(?<![^.])to_patch_embedding\.\d+\.layers\.", network="vit-pytorch's T2TViT", other=True
    ),
    **{family.name: Project(family.checkpoint_names, network=family.model, other=True) for family in FAMILIES},
}
"""Project -> its names; "upstream" is any other."""

UPSTREAM = "upstream"


def _pattern(part):
    return re.compile(r"(?<![^.])" + re.escape(part).replace(r"\#", r"(\d+)"))


def _translations(pairs):
    return tuple((_pattern(old), new.replace("#", r"\1")) for old, new in pairs)


_SIGNS = {name: re.compile(project.sign) for name, project in PROJECTS.items()}
_WRITE = {name: _translations(project.names) for name, project in PROJECTS.items()}
_READ = _translations((theirs, ours) for project in PROJECTS.values() for ours, theirs in project.names)


def layout(names: Iterable[str]) -> str:
    """The project that uses these names: a key of :data:`PROJECTS`, else "upstream"."""
    return next((project for project, sign in _SIGNS.items() if any(map(sign.search, names))), UPSTREAM)


def other_network(project: str) -> str | None:
    """The class that a project's weights fit, if its network is another one than upstream's."""
    found = PROJECTS.get(project)
    return found.network if found is not None and found.other else None


def from_project(name: str) -> str:
    """Upstream's name for a name of any project. Prefixes stay; upstream's own names are unchanged."""
    return _translate(name, _READ)


def to_project(names: Iterable[str], project: str) -> dict[str, str]:
    """{upstream's name: the project's}, for all tensors of a model.

    Args:
        names: upstream's names, without prefixes.
        project: a key of :data:`PROJECTS` with upstream's network, or "upstream".

    Raises:
        Refused: the project's network does not have some of these tensors.
    """
    names = list(names)
    if project == UPSTREAM:
        return {name: name for name in names}
    found = PROJECTS[project]
    over = [name for name in names if not re.fullmatch(found.takes, name)]
    if over:
        raise Refused(f"{found.network} does not have {listed(over)}")
    whole = any(name.startswith("head.") for name in names)
    prefix = {name: found.backbone if whole and not name.startswith("head.") else "" for name in names}
    return {name: prefix[name] + _translate(name, _WRITE[project]) for name in names}


def _translate(name, translations):
    for pattern, replacement in translations:
        name = pattern.sub(replacement, name)
    return name
