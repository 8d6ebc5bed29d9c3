"""Which rows there are: a group is one measurement, and every provider of it is a row.

Modes: "inference" is a forward pass without autograd in eval mode. "training" is, for an operator, forward and
backward; for a T2T module, forward and backward in train mode (dropout active); for a model, a whole step with
cross-entropy and AdamW.
"""

from typing import NamedTuple

BATCHES = {"cpu": (8, 1, 32), "cuda": (256, 1, 32)}
"""The headline batch first."""

MIDDLE = {"cpu": 8, "cuda": 32}
"""The batch for operators and for 384 px."""

DTYPES = {"cpu": ("fp32",), "cuda": ("bf16", "fp16", "fp32")}
"""Half types run under autocast with float32 parameters."""

OPERATORS = (
    "soft_split_linear-stage1",
    "soft_split_linear-stage2",
    "soft_split_linear-stage3",
    "performer_layer-stage1",
    "performer_layer-stage2",
    "performer_attention-stage1",
    "performer_attention-stage2",
    "token_mlp-stage1",
    "soft_split-stage1",
    "soft_split-stage2",
    "soft_split-stage3",
    "soft_split-fuseformer",
    "soft_composition-stage1",
    "soft_composition-stage2",
    "soft_composition-stage3",
    "soft_composition-fuseformer",
    "fused_fold_unfold-fuseformer",
)

LEFT_OUT_OF_QUICK = ("performer_attention-stage2",)

LENGTHS = {
    "cpu": {196: 128, 784: 32, 3136: 8, 9216: 2, 12544: 2, 50176: 1, 200704: 1},
    "cuda": {196: 256, 784: 256, 3136: 64, 9216: 64, 12544: 16, 50176: 4, 200704: 1, 1_000_000: 1},
}
"""Tokens that Performer attention is measured at, for where it overtakes softmax attention, and the batch at each: the
same number of tokens where that makes sense, and on a CPU as far as a call takes a second."""

HEADLINE_LENGTH = 3136
"""Stage 1 at 224 px: the only one of a quick run, and the only one in every dtype."""

CROSSOVER = "crossover"
"""In the name of every group of :data:`LENGTHS`, for ``--filter``."""

MODES = ("inference", "training")


class LeftOut(RuntimeError):
    """Why a provider of a group has no numbers here, in words; its row is skipped and the report says so."""


class Group(NamedTuple):
    """What is measured; its providers are measured interleaved."""

    level: str
    subject: str
    size: int | None
    """Pixels of the image's side; ``None`` where the subject says how many tokens there are."""
    batch: int
    dtype: str
    mode: str
    compiled: bool = True
    """Whether it has ``torch.compile`` rows; a quick run has them for T2T modules only, since they cost most time."""

    @property
    def id(self):
        where = CROSSOVER if self.size is None else f"{self.size}px"
        return f"{self.level}-{self.subject}-{where}-b{self.batch}-{self.dtype}-{self.mode}"


def length_groups(device, quick):
    """Performer attention by its number of tokens."""
    headline = all if quick else any
    return [
        Group("op", f"performer_attention-L{length}", None, batch, dtype, mode, compiled=not quick)
        for dtype in DTYPES[device]
        for length, batch in LENGTHS[device].items()
        for mode in MODES
        if headline((length == HEADLINE_LENGTH, dtype == DTYPES[device][0]))
    ]


def full_groups(level, device):
    """Every group of a level ("op", "module", "model"), the important ones first."""
    sizes = (224, 384)
    if level == "op":
        return [
            Group("op", subject, size, MIDDLE[device], dtype, mode)
            for dtype in DTYPES[device]
            for size in sizes
            for subject in OPERATORS
            for mode in MODES
            if size == 224 or not subject.endswith("fuseformer")
        ] + length_groups(device, quick=False)
    subjects = {
        "module": ("performer", "transformer"),
        "model": ("t2t_vit_7", "t2t_vit_14", "t2t_vit_t_14"),
    }[level]
    cells = [(subject, 224, batch) for batch in BATCHES[device] for subject in subjects]
    cells += [(subject, 384, MIDDLE[device]) for subject in subjects]
    if level == "model":
        # the larger models tell nothing new at the other batches
        cells = [cell for cell in cells if cell[0] == "t2t_vit_7" or cell[2] == BATCHES[device][0]]
    return [
        Group(level, subject, size, batch, dtype, mode)
        for dtype in DTYPES[device]
        for subject, size, batch in cells
        for mode in MODES
    ]


def quick_groups(level, device):
    """The headline rows: a few minutes on two CPU cores."""
    batch, dtype = BATCHES[device][0], DTYPES[device][0]
    if level == "module":
        return [Group("module", "performer", 224, batch, dtype, mode) for mode in MODES]
    if level == "model":
        return [Group("model", "t2t_vit_7", 224, batch, dtype, mode, compiled=False) for mode in MODES]
    return [
        Group("op", subject, 224, MIDDLE[device], dtype, mode, compiled=False)
        for subject in OPERATORS
        for mode in MODES
        if subject not in LEFT_OUT_OF_QUICK
    ] + length_groups(device, quick=True)


def groups(level, device, quick):
    """The groups of a level on a device."""
    return quick_groups(level, device) if quick else full_groups(level, device)
