"""Whether anything keeps a module or its parameters alive."""

import gc
import weakref


def assert_freed(owned, tensors=()):
    """Only the caller keeps the parameters of a module, and only the caller keeps its modules.

    ``owned``: a list with the last reference to the module, which it loses; tensors: weak references to others.
    """
    module = owned.pop()
    layers = [weakref.ref(each) for each in module.modules()]
    tensors = [*tensors, *(weakref.ref(parameter) for parameter in module.parameters())]
    for child in list(module.modules()):
        child._parameters.clear()
    gc.collect()
    assert not any(ref() is not None for ref in tensors)
    del module, child
    gc.collect()
    assert not any(ref() is not None for ref in layers)
