"""Small models, and files with their weights."""

import hashlib
import pickle

import torch
import torch.nn.functional as F

from t2t_fast.models import T2TViT

TINY = dict(img_size=64, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, token_dim=32, num_classes=10)


SMALL = dict(TINY, embed_dim=8, depth=1, num_heads=1, mlp_ratio=1, token_dim=8)


def tiny(**options):
    return T2TViT(**{**TINY, **options})


def small(**options):
    return T2TViT(**{**SMALL, **options})


def fingerprint(model):
    """A hash of the names, dtypes, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def exact_state(model):
    """The state that a failed load must not change: values, tensor and module objects, modes, the random state."""
    return (
        fingerprint(model),
        [(name, id(p), p.requires_grad, p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b), b.data_ptr()) for name, b in model.named_buffers(remove_duplicate=False)],
        [(name, id(m), type(m), m.training, getattr(m, "num_classes", None)) for name, m in model.named_modules()],
        torch.get_rng_state().tolist(),
    )


def same(model, state):
    mine = model.state_dict()
    return mine.keys() == state.keys() and all(torch.equal(mine[name], state[name]) for name in mine)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def paddle_file(state, protocol=4, rename=lambda name: name, **entries):
    """The bytes of a ``.pdparams`` of these weights: matrices are (in, out), except the Performer's random features."""
    arrays = {
        rename(name): value.numpy().T.copy() if value.ndim == 2 and not name.endswith(".w") else value.numpy()
        for name, value in state.items()
    }
    return pickle.dumps(
        {**arrays, "StructuredToParameterName@@": dict.fromkeys(arrays, "linear_0.w_0"), **entries}, protocol
    )


def resized_table(table, old, new, extra=1, mode="bicubic"):
    """The resized position table, computed without the package: channels first, interpolated, channels last again."""
    grid = table[:, extra:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode=mode, align_corners=False)
    return torch.cat([table[:, :extra], grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)], dim=1)
