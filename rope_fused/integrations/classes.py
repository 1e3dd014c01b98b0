"""Give one module a class with another forward, and take it back."""

import copy
from types import MethodType


class Patched:
    """Comes before the class of a module, in the class that a patched instance of it has.

    A class of its own, and not a method stored in the instance, is what survives a copy: replicas
    of nn.DataParallel and deep copies call their own forward, and no module refers to itself.
    """

    def __reduce_ex__(self, protocol):
        # A pickle names a class by where it is found, and ours is found nowhere: it takes the plain
        # module, in a form that the pickler does not check against the class of this one.
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return object.__new__, (plain_class(type(self)),), *state

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def patched_class(kind, forward):
    """The class ``kind``, under its name, with another forward."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(
        kind.__name__, (Patched, kind), names | {"__doc__": kind.__doc__, "forward": forward}
    )


def plain_class(kind):
    """``kind`` without what :func:`patched_class` did to it."""
    if not issubclass(kind, Patched):
        return kind
    if Patched in kind.__bases__:
        return kind.__bases__[1]
    # A class that was made on top of ours, as FSDP2 makes one: the same on top of the original.
    names = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, tuple(map(plain_class, kind.__bases__)), names)


def change_class(module, kind):
    """Make ``module`` a ``kind``, also where its class's forward was bound and kept.

    That is what accelerate's hooks do: they keep the forward they wrap in _old_forward, and taken
    off they leave it in forward.
    """
    old = type(module).forward
    module.__class__ = kind
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old:
            module.__dict__[name] = MethodType(kind.forward, module)


def has_own_forward(module):
    """Whether somebody replaced the forward of this instance; accelerate's hooks do not count."""
    held = module.__dict__
    name = "_old_forward" if "_hf_hook" in held and "_old_forward" in held else "forward"
    return name in held and getattr(held[name], "__func__", None) is not type(module).forward
