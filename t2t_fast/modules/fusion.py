"""When a layer may run as one fused operator: only if nobody watches or changes what is inside it.

A fused operator reads the parameters of a child module and never calls it. So a child that has hooks, that overrides
its class's ``forward``, or that is of another class (an adapter, a quantised layer) makes its layer run unfused: every
hook fires, every override counts, and only speed is lost.
"""

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_watched(module):
    """Whether someone registered a hook on this very module."""
    return any(len(getattr(module, name)) > 0 for name in _HOOKS)


def is_plain(module, kind):
    """Whether calling ``module`` does exactly what class ``kind`` does (parametrised weights are fine)."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not is_watched(module)
    )


def is_exact_gelu(module):
    """Whether ``module`` is a plain ``nn.GELU`` in its erf form."""
    return is_plain(module, nn.GELU) and module.approximate == "none"


def obstacle(layer, kinds):
    """Why ``layer`` cannot be fused, or ``None``.

    Args:
        layer: a module.
        kinds: dotted child name -> class it must plainly be, or a predicate on the child.
    """
    for name, kind in kinds.items():
        child = layer.get_submodule(name)
        fits = is_plain(child, kind) if isinstance(kind, type) else kind(child)
        if not fits:
            state = "has hooks" if is_watched(child) else f"is {type(child).__name__}"
            return f"{name} {state}"
    return None
