"""A calculator beside any task: arithmetic that the policy may leave to a tool."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.engine.fields.field_types import Finite, check_fields
from lockstep.rollout.environments.tool_environment import Tool, ToolEnvironment

Number = int | float

MAX_CHARACTERS = 400
MAX_EXPONENT = 64
MAX_MAGNITUDE = 10**100

_OPERATIONS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


@dataclass(frozen=True)
class CalculatorConfig:
    """error_reward: of a call that cannot be read or computed, on top of the run's rewards."""

    error_reward: Finite = 0.0

    def __post_init__(self):
        check_fields(self)


def build_calculator(config: CalculatorConfig) -> ToolEnvironment:
    tool = Tool(
        name="calculator",
        description="Computes an arithmetic expression of numbers, + - * / // % ** and parentheses.",
        parameters={
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
        run=calculate,
    )
    return ToolEnvironment([tool], config.error_reward)


def calculate(expression: str) -> str:
    """The value as text; a quotient that is whole is written without a point. Raises ValueError that says why not.

    Whatever the text, it takes little time and memory: lengths, exponents and magnitudes are bounded.
    """
    if not isinstance(expression, str) or len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression is a text of at most {MAX_CHARACTERS} characters")
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in what is no number anyway
            value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"cannot read {expression!r}") from None
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result = value
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
            result = _SIGNS[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            left_value, right_value = _value(left), _value(right)
            if isinstance(operation, ast.Pow) and abs(right_value) > MAX_EXPONENT:
                raise ValueError(f"exponents go up to {MAX_EXPONENT}")
            result = _OPERATIONS[type(operation)](left_value, right_value)
        case _:
            raise ValueError(f"cannot compute {ast.unparse(node)!r}")
    if isinstance(result, complex) or not abs(result) <= MAX_MAGNITUDE:
        raise ValueError("the value is not a number of at most 100 digits")
    return result
