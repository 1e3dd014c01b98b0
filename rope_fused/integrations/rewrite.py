"""Find the projections and the rotation in an attention's ``forward``, and put guards around them.

The work is done on the syntax tree of the class's own source. A recognised statement is never
thrown away: it stays behind a guard, so that a call which may not be fused (a LoRA adapter, a hook,
a sharded weight) runs the statements its authors wrote. Llama's attention becomes::

    fused = rope_fused.fuses(self, <positions>)
    if fused:
        query_states, key_states, value_states = rope_fused.project(
            self, hidden_states, <positions>)
    else:
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    if not fused:
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    ...
    if not fused:
        query_states, key_states = rope_fused.rotate(
            apply_rotary_pos_emb, self, query_states, key_states, cos, sin, positions=<positions>)

with ``kwargs.get("position_ids")`` for the positions. A family that spells these statements in
another way needs one more template below.
"""

import ast
import copy
import inspect
from dataclasses import dataclass
from types import CodeType, FunctionType

# In a template a name in capitals stands for any one name, the same one wherever it occurs.
_ROTATION = ast.parse("Q, K = apply_rotary_pos_emb(Q, K, COS, SIN)").body[0]
_PROJECTIONS = tuple(
    ast.parse(text).body[0]
    for text in (
        "OUT = self.PROJ(X).view(SHAPE).transpose(1, 2)",
        "OUT = self.NORM(self.PROJ(X).view(SHAPE)).transpose(1, 2)",
    )
)
# The names that the rewritten function has besides its family's own.
_HANDLER, _FUSED = "_rope_fused", "_rope_fused_now"


class Unrecognised(Exception):
    """These statements have no known form; the message says what is missing."""


@dataclass(frozen=True)
class Projection:
    """``variable = [self.norm](self.module(source).view(...)).transpose(1, 2)``, at body[index]."""

    index: int
    variable: str
    module: str
    norm: str | None
    source: str


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What was recognised in a ``forward``: a rotation, and projections or why there are none."""

    function: FunctionType
    tree: ast.FunctionDef
    rotation: int  # its index in the body
    query: str
    key: str
    positions: str  # the expression that gives the position ids; "None" if the forward has none
    projections: tuple[Projection, ...]  # of q, of k and, where it was found, of v; or ()
    obstacle: str  # why there are no projections; "" if there are
    children: frozenset[str]  # attributes of self that are read up to and including the rotation

    @property
    def results(self):
        """The variables that projections and rotation leave behind: q, k and perhaps v."""
        return tuple(p.variable for p in self.projections) or (self.query, self.key)


def examine(function):
    """The Anatomy of an attention's ``forward`` (a plain function); raises Unrecognised."""
    tree = _source_tree(function)
    found = [(i, names) for i, s in enumerate(tree.body) if (names := _match(_ROTATION, s))]
    if len(found) != 1:
        raise Unrecognised(_no_rotation(tree, len(found)))
    rotation, names = found[0]
    query, key = names["Q"], names["K"]
    try:
        projections, obstacle = _find_projections(tree.body[:rotation], query, key), ""
    except Unrecognised as reason:
        projections, obstacle = (), str(reason)
    head = [node for statement in tree.body[: rotation + 1] for node in ast.walk(statement)]
    children = frozenset(
        node.attr
        for node in head
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
    positions = _positions(tree.args)
    return Anatomy(function, tree, rotation, query, key, positions, projections, obstacle, children)


def rewrite(anatomy, handler, *, fuse, probe=False):
    """The forward of ``anatomy`` with its recognised statements guarded and handed to ``handler``.

    handler  has ``fuses(module, positions)``, ``project(module, source, positions)`` and
             ``rotate(original, module, q, k, cos, sin, positions)``; None leaves all as it is.
    fuse     guard the projections as well as the rotation.
    probe    return the ``results`` right after the rotation, before any cache or attention.

    The result runs in the globals of the old function, to which nothing is added: the handler is a
    closure variable. It refers to no module and can be bound to any instance of the class.
    """
    tree = copy.deepcopy(anatomy.tree)
    if handler is not None:
        tree.body = _guarded(anatomy, tree.body, fuse)
    if probe:
        # The guarded rotation is the last of its statements, counted from the end.
        end = len(tree.body) - len(anatomy.tree.body) + anatomy.rotation + 1
        leave = _parse(f"return {', '.join(anatomy.results)}", tree.body[end - 1])
        tree.body = tree.body[:end] + leave
    return _compile(anatomy.function, tree, handler)


def _guarded(anatomy, body, fuse):
    """The statements of ``body`` with the guards that the head of this file shows."""
    projections = {p.index: p for p in anatomy.projections} if fuse else {}
    result = []
    for index, statement in enumerate(body):
        if index == anatomy.rotation:
            call = statement.value
            call.args[:0] = [call.func, _parse("self", statement)[0].value]
            call.func = _parse(f"{_HANDLER}.rotate", statement)[0].value
            positions = _parse(anatomy.positions, statement)[0].value
            call.keywords.append(ast.keyword("positions", positions))
        if index in projections and index == min(projections):
            source = projections[index].source
            outputs = ", ".join(p.variable for p in anatomy.projections)
            operands = f"self, {source}, {anatomy.positions}"
            result += _parse(f"{_FUSED} = {_HANDLER}.fuses(self, {anatomy.positions})", statement)
            guard = _parse(
                f"if {_FUSED}: {outputs} = {_HANDLER}.project({operands})\nelse: pass", statement
            )[0]
            guard.orelse = [statement]
            statement = guard
        elif projections and (index in projections or index == anatomy.rotation):
            guard = _parse(f"if not {_FUSED}: pass", statement)[0]
            guard.body = [statement]
            statement = guard
        result.append(statement)
    return result


def _source_tree(function):
    """The FunctionDef of ``function``; Unrecognised if its source is not what runs."""
    if not isinstance(function, FunctionType):
        raise Unrecognised(f"its forward is a {type(function).__name__}, not a plain function")
    code = function.__code__
    if hasattr(function, "__wrapped__") or code.co_freevars:
        raise Unrecognised("its forward is decorated or has a closure")
    try:
        file = ast.parse("".join(inspect.findsource(function)[0]))
        compiled = compile(file, code.co_filename, "exec", dont_inherit=True)
    except (OSError, TypeError, SyntaxError) as error:
        raise Unrecognised(f"the source of its forward cannot be read: {error}") from None
    # The file may have changed since its import, or the function may have been made in another way:
    # only a source that compiles to the very code object that runs is one to work on.
    if not any(code == candidate for candidate in _codes(compiled)):
        raise Unrecognised("the source of its forward is not the code that runs")
    return next(
        node
        for node in ast.walk(file)
        if isinstance(node, ast.FunctionDef)
        and (node.name, node.lineno) == (code.co_name, code.co_firstlineno)
    )


def _codes(code):
    """Every code object inside ``code``."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _no_rotation(tree, count):
    if count:
        return f"its forward rotates {count} times"
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if "apply_rotary_pos_emb" in names:
        return "its forward calls apply_rotary_pos_emb in a form that is not known"
    return "its forward has no rotary embedding of a known form"


def _positions(arguments):
    """The expression for the position ids inside a function with these arguments."""
    if any(a.arg == "position_ids" for a in (*arguments.args, *arguments.kwonlyargs)):
        return "position_ids"
    return f"{arguments.kwarg.arg}.get('position_ids')" if arguments.kwarg else "None"


def _find_projections(body, query, key):
    """The projections of q, k and perhaps v among the statements before the rotation."""
    found = []
    for index, statement in enumerate(body):
        for template in _PROJECTIONS:
            if names := _match(template, statement):
                found.append(
                    Projection(index, names["OUT"], names["PROJ"], names.get("NORM"), names["X"])
                )
    by_variable = {p.variable: p for p in found}
    if len(by_variable) != len(found) or query not in by_variable or key not in by_variable:
        raise Unrecognised("its projections of q and k are of no known form")
    q, k = by_variable.pop(query), by_variable.pop(key)
    if q.source != k.source or (q.norm is None) != (k.norm is None):
        raise Unrecognised("q and k are projected or normed in different ways")
    values = [p for p in by_variable.values() if p.norm is None and p.source == q.source]
    chosen = (q, k, *values[:1])
    # Fused, q and k exist (rotated) from the first projection on, and all see the source of then.
    start = min(p.index for p in chosen)
    indices = {p.index for p in chosen}
    between = [s for i, s in enumerate(body[start:], start) if i not in indices]
    names = [node for s in between for node in ast.walk(s) if isinstance(node, ast.Name)]
    for node in names:
        if node.id in (query, key):
            raise Unrecognised(f"{node.id} is used between its projection and its rotation")
        if node.id == q.source and not isinstance(node.ctx, ast.Load):
            raise Unrecognised(f"{node.id} changes between the projections")
    return chosen


def _match(template, node):
    """{capital name: what it stands for} if ``node`` has the form of ``template``, else None."""
    names = {}

    def same(a, b):
        if isinstance(a, ast.Name) and a.id.isupper():
            return isinstance(b, ast.Name) and names.setdefault(a.id, b.id) == b.id
        if isinstance(a, str) and a.isupper():
            return isinstance(b, str) and names.setdefault(a, b) == b
        if type(a) is not type(b):
            return False
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, ast.AST):
            return all(same(getattr(a, f, None), getattr(b, f, None)) for f in a._fields)
        return a == b

    return names if same(template, node) else None


def _parse(text, at):
    """The statements of ``text``, standing where the node ``at`` stands in its file."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        ast.copy_location(node, at)
    return tree.body


def _compile(function, tree, handler):
    """The function that ``tree`` defines, with the globals and defaults of ``function``."""
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    tree.returns = None
    # Defaults are taken over as values: evaluating their expressions again could give others.
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [d and ast.Constant(None) for d in tree.args.kw_defaults]
    module = ast.parse(f"def make({_HANDLER}):\n    return {tree.name}")
    module.body[0].body.insert(0, tree)
    ast.fix_missing_locations(module)
    code = compile(module, function.__code__.co_filename, "exec", dont_inherit=True)
    make = next(c for c in code.co_consts if isinstance(c, CodeType))
    made = FunctionType(make, function.__globals__)(handler)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    made.__doc__, made.__qualname__ = function.__doc__, function.__qualname__
    return made
