"""reasoning-gym's verifiers, as a pool's process loads them; see `verifier_main`.

The table is read by the task too, so the libraries, which take a second, are imported where they are used.

Some of them evaluate the answer as Python, some through sympy, which does the same. An answer that is a program, and no
literal or expression, is refused there, since it could read the reference or give itself full marks.
"""

import ast
import builtins
import sys
import types

# How a data set evaluates an answer. All others compare texts, numbers or JSON.
PYTHON, SYMPY = "eval", "sympy.parse_expr"
EVALUATES = {
    "binary_matrix": PYTHON,
    "n_queens": PYTHON,
    "spiral_matrix": PYTHON,
    "string_insertion": PYTHON,
    "countdown": SYMPY,
    "intermediate_integration": SYMPY,
    "polynomial_multiplication": SYMPY,
    "puzzle24": SYMPY,
    "simple_integration": SYMPY,
}

_ARITHMETIC = (ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop)
_LITERAL = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load, *_ARITHMETIC)
_PROGRAM = (
    *(ast.Attribute, ast.Subscript, ast.Lambda, ast.NamedExpr, ast.JoinedStr, ast.Await, ast.Yield, ast.YieldFrom),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
_TAKES_TEXT = {"Symbol", "Function", "Integer", "Float", "Rational"}  # what sympy's parser puts around a name or number
_HARMLESS_BUILTINS = {"abs", "divmod", "max", "min", "pow", "round", "sum"}


def verifier(dataset: str, options: dict):
    """The function (problem, answer) -> score of a data set with these options."""
    import reasoning_gym

    made = reasoning_gym.create_dataset(dataset, seed=0, size=1, **options)
    parts = getattr(made, "datasets", None) or {dataset: made}  # of `composite`, by name
    for name, part in parts.items():
        if EVALUATES.get(name) == PYTHON:
            sys.modules[type(part).__module__].eval = _evaluate_literal

    def score(problem, answer: str | None):
        name = problem.metadata["source_dataset"] if made is not parts.get(dataset) else dataset
        if answer is not None and EVALUATES.get(name) is not None and is_program(answer, EVALUATES[name]):
            raise ValueError("the answer is a program, which is not executed")
        entry = {"question": problem.question, "answer": problem.answer, "metadata": problem.metadata}
        return made.score_answer(answer, entry)

    return score


def is_program(answer: str, evaluated_by: str) -> bool:
    """Whether the answer, where it is evaluated, would do more than arithmetic. What does not parse is none."""
    try:
        return (_is_python_program if evaluated_by == PYTHON else _is_sympy_program)(answer)
    except Exception:  # tokens, syntax, recursion: the verifier meets the same error, and knows what it is worth
        return False


def _is_python_program(answer: str) -> bool:
    return any(isinstance(node, (ast.Call, *_PROGRAM)) for node in ast.walk(ast.parse(answer.strip(), mode="eval")))


def _is_sympy_program(answer: str) -> bool:
    from sympy.parsing.sympy_parser import standard_transformations, stringify_expr

    code = stringify_expr(answer, {}, _sympy_names(), standard_transformations)
    tree = ast.parse(code.strip(), mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, _PROGRAM) or (isinstance(node, ast.Call) and _passes_text(node)):
            return True
        if isinstance(node, ast.Name) and (node.id.startswith("_") or _is_builtin(node.id)):
            return True
    return False


def _passes_text(call: ast.Call) -> bool:
    """sympy evaluates a text that a function is given, but for those that its parser writes itself."""
    if isinstance(call.func, ast.Name) and call.func.id in _TAKES_TEXT:
        return False
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(_is_text(argument) for argument in arguments)


def _is_text(node: ast.AST) -> bool:
    """Whether it has a text in it that no call of the parser's own takes."""
    if isinstance(node, ast.Call):
        return _passes_text(node)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str | bytes)
    return any(_is_text(child) for child in ast.iter_child_nodes(node))


def _is_builtin(name: str) -> bool:
    import sympy

    return hasattr(builtins, name) and not hasattr(sympy, name) and name not in _HARMLESS_BUILTINS


def _sympy_names() -> dict:
    """The names that sympy's parser leaves as they are."""
    import sympy

    functions = {name: value for name, value in vars(builtins).items() if isinstance(value, types.BuiltinFunctionType)}
    exported = {name: getattr(sympy, name) for name in sympy.__all__}
    return {**exported, **functions}


def _evaluate_literal(text: str):
    """In the place of `eval`: lists of numbers and texts, also as products, but no names."""
    tree = ast.parse(text.strip(), mode="eval")
    if not all(isinstance(node, _LITERAL) for node in ast.walk(tree)):
        raise ValueError("no literal")
    return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})
