"""The public names: their signatures are those of golden/api.txt, and each says what it is.

After a change that is meant: python tests/test_api.py > tests/golden/api.txt
"""

import inspect
from pathlib import Path

import pytest

import rope_fused as rf

GOLDEN = Path(__file__).parent / "golden" / "api.txt"
# What public functions return; the modules besides the top one that the README imports from.
RETURNED = ("DoctorReport", "PatchReport")
MODULES = {
    "rope_fused.context.perplexity": ("perplexity",),
    "rope_fused.context.swap": ("reset_rope", "set_rope", "swapped"),
    "rope_fused.distributed": ("sequence_shard", "sequence_unshard"),
}


def public():
    """(name, object) of everything that users call, members of classes behind their class."""
    owners = [("rope_fused", rf, (*rf.__all__, *RETURNED))]
    owners += [(n, __import__(n, fromlist=["_"]), names) for n, names in MODULES.items()]
    for module, owner, names in owners:
        for name in sorted(names):
            found = getattr(owner, name)
            yield f"{module}.{name}", found
            if inspect.isclass(found):
                for member, value in sorted(vars(found).items()):
                    called = inspect.isroutine(value) or isinstance(value, property)
                    if called and not member.startswith("_"):
                        yield f"{module}.{name}.{member}", value


def line(name, found):
    """The name with its parameters and their defaults; no annotations, which change no call."""
    if isinstance(found, property):
        return name
    signature = inspect.signature(getattr(found, "__func__", found))  # of a class method
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return name + str(signature.replace(parameters=bare, return_annotation=signature.empty))


def text():
    return "".join(f"{line(*one)}\n" for one in public())


def test_signatures():
    pytest.importorskip("transformers", minversion="5")
    assert text() == GOLDEN.read_text()


def test_everything_says_what_it_is():
    pytest.importorskip("transformers", minversion="5")
    for name, found in public():
        assert inspect.getdoc(found), name


def test_public_names_are_here():
    assert [*rf.__all__] == sorted(rf.__all__)
    assert {*rf.__all__} <= {*dir(rf)}
    for name in rf.__all__:
        assert getattr(rf, name) is not None


if __name__ == "__main__":
    print(text(), end="")
