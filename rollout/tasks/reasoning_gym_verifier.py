"""reasoning-gym's verifiers, as a pool's process loads them; see `verifier_main`.

The table is read by the task too, so the libraries, which take a second, are imported where they are used.

Some of them evaluate the answer as Python, some through sympy, which does the same. An answer that is a program, and no
literal or expression, is refused there, since it could read the reference or give itself full marks.
"""

import ast
import builtins
import io
import sys
import tokenize
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
_MATHEMATICS = {
    *("abs", "divmod", "max", "min", "pow", "round", "sum"),
    *("S", "N", "cbrt", "diff", "expand", "factor", "integrate", "ln", "real_root", "root", "simplify", "sqrt"),
}


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
    """sympy evaluates texts that functions are given, and some of its functions make texts or code of expressions."""
    from sympy.parsing.sympy_parser import standard_transformations, stringify_expr

    names = _sympy_names()
    code = stringify_expr(answer, {}, names, standard_transformations)
    tree = ast.parse(code.strip(), mode="eval")
    if ("(" in answer or "!" in answer) and _has_text(answer):  # "!" becomes a call; in `code` the parser adds texts
        return True
    for node in ast.walk(tree):
        if isinstance(node, _PROGRAM) or (isinstance(node, ast.Name) and not _is_mathematics(node.id, names)):
            return True
    return False


def _has_text(answer: str) -> bool:
    tokens = tokenize.generate_tokens(io.StringIO(answer.strip()).readline)
    return any("STRING" in tokenize.tok_name[token.type] for token in tokens)


def _is_mathematics(name: str, names: dict) -> bool:
    """Whether a name is an expression of sympy's, a class of them, or a function that gives nothing else."""
    from sympy import Basic

    if name in _MATHEMATICS:
        return True
    value = names.get(name)
    return isinstance(value, Basic) or (isinstance(value, type) and issubclass(value, Basic))


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
