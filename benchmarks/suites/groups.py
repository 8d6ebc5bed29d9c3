"""Which rows there are: a group is one measurement, and every provider of it is a row.

A suite is a file of tests, and asks one question: how fast are the T2T module, whole models, their training steps, a
single image, the operators; how does time grow. Modes: "inference" is a forward pass without autograd in eval mode.
"training" is, for an operator, forward and backward; for a T2T module, forward and backward in train mode (dropout
active); for a model, a whole step with cross-entropy and AdamW.
"""

from typing import NamedTuple

BATCHES = {"cpu": (8, 32), "cuda": (256, 32)}
"""The headline batch first."""

MIDDLE = {"cpu": 8, "cuda": 32}
"""The batch for operators and for 384 px."""

DTYPES = {"cpu": ("fp32",), "cuda": ("bf16", "fp16", "fp32")}
"""Half types run under autocast with float32 parameters."""

MODULES = ("performer", "transformer")
LITE, LARGER = ("t2t_vit_7", "t2t_vit_10", "t2t_vit_12"), ("t2t_vit_14", "t2t_vit_t_14")
"""Measured models. The lite ones first: their front end is the largest share."""

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
    "cpu": {196: 128, 784: 32, 3136: 8, 9216: 2, 12544: 2, 50176: 1, 200704: 1, 1_000_000: 1},
    "cuda": {196: 256, 784: 256, 3136: 64, 9216: 64, 12544: 16, 50176: 4, 200704: 1, 1_000_000: 1},
}
"""Tokens that Performer attention is measured at, for where it overtakes softmax attention, and the batch at each: the
same number of tokens where that makes sense."""

HEADLINE_LENGTH = 3136
"""Stage 1 at 224 px: the only one of a quick run, and the only one in every dtype."""

CROSSOVER = "crossover"
"""In the name of every group of :data:`LENGTHS`, for ``--filter``."""

SCALED_BATCHES = {
    "cpu": {"inference": (1, 4, 16, 64, 256, 1024), "training": (1, 4, 16, 64)},
    "cuda": {"inference": (1, 4, 16, 64, 256, 1024), "training": (1, 4, 16, 64, 256, 1024)},
}
"""At 224 px. On a CPU upstream's training step of 256 images takes 10 seconds and 6 GB."""

SCALED_SIZES = (224, 384, 512, 768, 1024, 1536, 2048)
"""At batch 1."""

QUICK_SCALED = {"batches": (1, 16, 64), "sizes": (224, 512, 1024)}

FIT_SIZES = (224, 384, 512)
"""Where the largest batch is looked for."""

MODES = ("inference", "training")

TIMED = ("module", "models", "training", "latency", "ops", "scaling")
SUITES = (*TIMED, "memory", "processes")
"""In the order in which they run: what matters most first, for runs with a time limit."""

OWN_NAMES = ("latency", "scaling", "memory", "processes")
"""Suites that a group is named after; the others' groups differ by level or mode."""


class LeftOut(RuntimeError):
    """Why a provider of a group has no numbers here, in words; its row is skipped and the report says so."""


LOST = "its call ended the process's CUDA context"
"""In the reason of a row that no later part of a run measures."""


class ContextLost(RuntimeError):
    """A provider's call ended the CUDA context of this process, after which every call fails, whatever it is.

    Attributes:
        provider: its name.
    """

    def __init__(self, provider, failure):
        text = next(iter(str(failure).strip().splitlines()), "")
        super().__init__(f"{LOST}: {type(failure).__name__}: {text}")
        self.provider = provider


class Group(NamedTuple):
    """What is measured; its providers are measured interleaved."""

    level: str
    """Of the subject: "op", "module" or "model"."""
    subject: str
    size: int | None
    """Pixels of the image's side; ``None`` where the subject says how many tokens there are."""
    batch: int | None
    """Images a call; ``None`` where the largest batch is what is looked for."""
    dtype: str
    mode: str
    compiled: bool = True
    """Whether it has ``torch.compile`` rows; a quick run has them for T2T modules only, since they cost most time."""
    suite: str | None = None
    processes: int = 1
    """That train side by side, each with ``batch`` images."""

    @property
    def id(self):
        """Unique in a run."""
        kind = self.suite if self.suite in OWN_NAMES else self.level
        where = CROSSOVER if self.size is None else f"{self.size}px"
        batch = "" if self.batch is None else f"-b{self.batch}"
        processes = f"-n{self.processes}" if self.suite == "processes" else ""
        return f"{kind}-{self.subject}-{where}{batch}-{self.dtype}-{self.mode}{processes}"


def length_groups(device, quick):
    """Performer attention by its number of tokens."""
    headline = all if quick else any
    return [
        Group("op", f"performer_attention-L{length}", None, batch, dtype, mode, not quick, "ops")
        for dtype in DTYPES[device]
        for length, batch in LENGTHS[device].items()
        for mode in MODES
        if headline((length == HEADLINE_LENGTH, dtype == DTYPES[device][0]))
    ]


def _ops(device, quick):
    dtypes, sizes = (DTYPES[device][:1], (224,)) if quick else (DTYPES[device], (224, 384))
    return [
        Group("op", subject, size, MIDDLE[device], dtype, mode, not quick, "ops")
        for dtype in dtypes
        for size in sizes
        for subject in OPERATORS
        for mode in MODES
        if (size == 224 or not subject.endswith("fuseformer")) and not (quick and subject in LEFT_OUT_OF_QUICK)
    ] + length_groups(device, quick)


def _module(device, quick):
    if quick:
        return [
            Group("module", MODULES[0], 224, BATCHES[device][0], DTYPES[device][0], mode, suite="module")
            for mode in MODES
        ]
    cells = [(subject, 224, batch) for batch in BATCHES[device] for subject in MODULES]
    cells += [(subject, 384, MIDDLE[device]) for subject in MODULES]
    return [
        Group("module", *cell, dtype, mode, suite="module")
        for dtype in DTYPES[device]
        for cell in dict.fromkeys(cells)
        for mode in MODES
    ]


def _models(device, quick, suite, mode):
    if quick:
        return [Group("model", LITE[0], 224, BATCHES[device][0], DTYPES[device][0], mode, False, suite)]
    cells = [(subject, 224, BATCHES[device][0]) for subject in (*LITE, *LARGER)]
    # the larger models tell nothing new at the other batch
    cells += [(LITE[0], 224, batch) for batch in BATCHES[device][1:]]
    cells += [(subject, 384, MIDDLE[device]) for subject in (LITE[0], *LARGER)]
    return [
        Group("model", *cell, dtype, mode, suite=suite) for dtype in DTYPES[device] for cell in dict.fromkeys(cells)
    ]


def _latency(device, quick):
    subjects = [("model", LITE[0]), ("module", MODULES[0])]
    if not quick:
        subjects += [("model", LARGER[0]), ("model", LARGER[1]), ("module", MODULES[1])]
    dtypes = DTYPES[device][:1] if quick else DTYPES[device]
    return [
        Group(level, subject, 224, 1, dtype, "inference", not quick, "latency")
        for dtype in dtypes
        for level, subject in subjects
    ]


def _scaling(device, quick):
    found = []
    for mode in MODES[:1] if quick else MODES:
        batches = QUICK_SCALED["batches"] if quick else SCALED_BATCHES[device][mode]
        sizes = QUICK_SCALED["sizes"] if quick else SCALED_SIZES
        for size, batch in dict.fromkeys([(224, batch) for batch in batches] + [(size, 1) for size in sizes]):
            found.append(Group("module", MODULES[0], size, batch, DTYPES[device][0], mode, False, "scaling"))
    return found


def _memory(device, quick):
    subjects, sizes = ((LITE[0],), FIT_SIZES[:1]) if quick else ((LITE[0], *LARGER), FIT_SIZES)
    return [
        Group("model", subject, size, None, DTYPES[device][0], "training", False, "memory")
        for subject in subjects
        for size in sizes
    ]


def _processes(device, quick):
    if device != "cpu":
        return []
    return [Group("model", LITE[0], 224, 4, "fp32", "training", False, "processes", count) for count in (1, 2)]


def groups(suite, device, quick):
    """The groups of a suite on a device, the important ones first; quick: the headline rows."""
    if suite in ("models", "training"):
        return _models(device, quick, suite, "inference" if suite == "models" else "training")
    makers = {
        "ops": _ops,
        "module": _module,
        "latency": _latency,
        "scaling": _scaling,
        "memory": _memory,
        "processes": _processes,
    }
    return makers[suite](device, quick)
