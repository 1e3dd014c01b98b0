"""Read an attention's ``forward`` from its source, and compile it with some of its calls replaced.

The work is done on the syntax tree of the class's own source. No statement is taken away or moved:
calls of projections, of norms and of the rotary function are handed to an object made at the start
of each call, and everything around them stays what its authors wrote. Llama's attention becomes::

    call = rope_fused.begin(self, position_embeddings, kwargs.get("position_ids"))
    ...
    query_states = call.run("q_proj", hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = call.run("k_proj", hidden_states).view(hidden_shape).transpose(1, 2)
    ...
    query_states, key_states = call.rotate(
        0, apply_rotary_pos_emb, query_states, key_states, cos, sin)
"""

import ast
import copy
import inspect
import re
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType

# The names that the rewritten function has besides its family's own.
_HANDLER, _CALL = "_rope_fused", "_rope_fused_call"
_ROTARY = re.compile(r"_?apply_\w*rot(ary|ate)\w*")


class Unrecognised(Exception):
    """A forward that cannot be read or rewritten; the message says why."""


@dataclass(frozen=True, eq=False)
class Source:
    """A ``forward`` as it was written.

    function   the plain function, inside any decorators
    wrappers   the decorators' functions around it, outermost first
    tree       its definition
    end        how many statements of its body it takes to come past the last rotation
    sites      how many calls of a rotary function these hold
    children   the attributes of self that these read
    optional   {attribute: test} of those that a call may do without, by what it is given
    live       the names that the statements after them read before they write them
    by_type    whether it is given the tables of every layer type, and chooses
    varying    a test, before ``end``, of more than the module and of what it is given or not; ""
    """

    function: FunctionType
    wrappers: tuple[FunctionType, ...]
    tree: ast.FunctionDef
    end: int
    sites: int
    children: frozenset[str]
    optional: dict[str, str]
    live: frozenset[str]
    by_type: bool
    varying: str


def rotates(forward):
    """Whether a class's ``forward`` calls a rotary function, as far as a glance can tell."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    return code is not None and any(map(_ROTARY.fullmatch, code.co_names))


def read(forward):
    """The Source of a class's ``forward``; raises Unrecognised."""
    wrappers, function = _unwrapped(forward)
    tree = _source_tree(function)
    having = [index for index, statement in enumerate(tree.body) if _sites(statement)]
    if not having:
        raise Unrecognised("its forward has no rotary embedding of a known form")
    end = having[-1] + 1
    head, rest = tree.body[:end], tree.body[end:]
    return Source(
        function,
        wrappers,
        tree,
        end,
        sum(len(_sites(statement)) for statement in head),
        frozenset(_attributes(head)),
        _optional(head),
        _read_before_written(rest),
        any(_chooses(node) for node in _walk(head)),
        next(filter(None, map(_varying, _walk(head))), ""),
    )


def rewrite(source, handler, names, *, probe=False):
    """The forward of ``source`` with a handler in it.

    handler  ``begin(module, tables, positions)`` makes the object that has ``run(name, *args)`` and
             ``rotate(site, function, *args)``
    names    None: every ``self.NAME(...)`` up to the last rotation
    probe    return the local variables right after the last rotation, before any cache or attention

    The result runs in the globals of the old function, to which nothing is added: the handler is a
    closure variable. It refers to no module and can be bound to any instance of the class.
    """
    tree = copy.deepcopy(source.tree)
    editor = _Editor(names)
    head = [editor.visit(statement) for statement in tree.body[: source.end]]
    known = {a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)}
    tables = "position_embeddings" if "position_embeddings" in known else "False"
    operands = f"{tree.args.args[0].arg}, {tables}, {_positions(tree.args, known)}"
    begin = _parse(f"{_CALL} = {_HANDLER}.begin({operands})", head[0])
    rest = _parse("return dict(locals())", head[-1]) if probe else tree.body[source.end :]
    tree.body = begin + head + rest
    function = _compile(source.function, tree, handler)
    return function if probe else _wrapped(source.wrappers, function)


class _Editor(ast.NodeTransformer):
    """Hands the calls of an attention's forward over to the object of one call."""

    def __init__(self, names):
        self.names, self.site = names, 0

    def visit_Call(self, node):
        site = self.site
        rotary = _is_site(node)
        self.site += rotary
        self.generic_visit(node)
        if rotary:
            return self._replaced(node, f"{_CALL}.rotate", ast.Constant(site), node.func)
        function = node.func
        own = isinstance(function, ast.Attribute) and _is_self(function.value)
        if own and (self.names is None or function.attr in self.names):
            return self._replaced(node, f"{_CALL}.run", ast.Constant(function.attr))
        return node

    def _replaced(self, node, function, *first):
        function = _parse(function, node)[0].value
        return ast.copy_location(ast.Call(function, [*first, *node.args], node.keywords), node)


def _is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"


def _is_site(node):
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    return bool(_ROTARY.fullmatch(name))


def _sites(statement):
    return [node for node in ast.walk(statement) if _is_site(node)]


def _walk(statements):
    return (node for statement in statements for node in ast.walk(statement))


def _attributes(statements):
    """The attributes of self that ``statements`` name."""
    return (n.attr for n in _walk(statements) if _is_self(getattr(n, "value", None)))


def _optional(statements):
    """{attribute of self: test} of those in branches that are taken by what a call is given."""
    found = {}
    for node in _walk(statements):
        if isinstance(node, ast.If) and _names(node.test):
            found |= dict.fromkeys(_attributes([*node.body, *node.orelse]), ast.unparse(node.test))
    return found


def _names(test):
    """The variables, other than the module, that ``test`` depends on."""
    return {n.id for n in ast.walk(test) if isinstance(n, ast.Name)} - {"self", "hasattr"}


def _chooses(node):
    """Whether ``node`` looks its tables up by the attribute of a module."""
    return (
        isinstance(node, ast.Subscript)
        and getattr(node.value, "id", "") == "position_embeddings"
        and isinstance(node.slice, ast.Attribute)
    )


def _read_before_written(statements):
    """The names that ``statements`` read and have not all written before."""
    read, written = set(), set()
    for statement in statements:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        read |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - written
        if isinstance(statement, ast.Assign):
            written |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return frozenset(read)


def _varying(node):
    """The test of ``node``, if two calls of the same module may have different answers to it."""
    if isinstance(node, ast.While | ast.For | ast.Try | ast.With | ast.Match):
        return type(node).__name__.lower()
    if not isinstance(node, ast.If | ast.IfExp):
        return ""
    test = node.test
    parts = test.values if isinstance(test, ast.BoolOp) else [test]
    for part in parts:
        names = _names(part)
        absent = isinstance(part, ast.Compare) and isinstance(part.ops[0], ast.Is | ast.IsNot)
        if names and not (absent and isinstance(part.left, ast.Name) and len(names) == 1):
            return ast.unparse(test)
    return ""


def _positions(arguments, known):
    """The expression for the position ids inside a function with these arguments."""
    if "position_ids" in known:
        return "position_ids"
    return f"{arguments.kwarg.arg}.get('position_ids')" if arguments.kwarg else "None"


def _unwrapped(function):
    """(functions of decorators, outermost first; the function that they decorate)."""
    wrappers = []
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        if not any(cell.cell_contents is function.__wrapped__ for cell in function.__closure__):
            raise Unrecognised("its forward is decorated by something that is not a plain function")
        wrappers.append(function)
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise Unrecognised(f"its forward is a {type(function).__name__}, not a plain function")
    return tuple(wrappers), function


def _wrapped(wrappers, function):
    """``function`` in the decorators ``wrappers``, which go on to hold their own old one."""
    for wrapper in reversed(wrappers):
        cells = tuple(
            CellType(function) if cell.cell_contents is wrapper.__wrapped__ else cell
            for cell in wrapper.__closure__
        )
        name, defaults = wrapper.__name__, wrapper.__defaults__
        made = FunctionType(wrapper.__code__, wrapper.__globals__, name, defaults, cells)
        made.__kwdefaults__ = wrapper.__kwdefaults__
        made.__dict__.update(wrapper.__dict__ | {"__wrapped__": function})
        made.__doc__, made.__qualname__ = wrapper.__doc__, wrapper.__qualname__
        function = made
    return function


def _source_tree(function):
    """The FunctionDef of ``function``; Unrecognised if its source is not what runs."""
    code = function.__code__
    if {*code.co_freevars} - {"__class__"}:  # which super() needs
        raise Unrecognised("its forward has a closure")
    try:
        lines = inspect.findsource(function)[0]
        file = ast.parse("".join(lines))
        compiled = compile(file, code.co_filename, "exec", dont_inherit=True)
    except (OSError, TypeError, SyntaxError) as error:
        raise Unrecognised(f"the source of its forward cannot be read: {error}") from None
    # The file may have changed since its import, or the function may have been made in another way:
    # only a source that compiles to the very code object that runs is one to work on.
    if not any(code == candidate for candidate in _codes(compiled)):
        raise Unrecognised("the source of its forward is not the code that runs")
    for node in ast.walk(file):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno:
                node.decorator_list = []
                return node
    raise Unrecognised("the source of its forward cannot be found")


def _codes(code):
    """Every code object inside ``code``."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


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
    names = ", ".join([_HANDLER, *function.__code__.co_freevars])
    module = ast.parse(f"def make({names}):\n    return {tree.name}")
    module.body[0].body.insert(0, tree)
    ast.fix_missing_locations(module)
    code = compile(module, function.__code__.co_filename, "exec", dont_inherit=True)
    make = next(c for c in code.co_consts if isinstance(c, CodeType))
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    made = FunctionType(make, function.__globals__)(handler, *held)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    made.__doc__, made.__qualname__ = function.__doc__, function.__qualname__
    return made
