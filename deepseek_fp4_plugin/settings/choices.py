"""Choices: frozen sets of named settings, checked, with one sentence (ValueError) for what is wrong."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NoReturn

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, Strict, ValidationError

# Strict: a misplaced "32" or True is a mistake, not a number.
Int = Annotated[int, Strict()]
Real = Annotated[float, Strict(), AllowInfNan(False)]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
MOST = 2**31 - 1  # what fits the 32-bit counts of kernels and time-outs; more is a slip of the keyboard
Count = Annotated[Int, Field(ge=1, le=MOST)]
TokenId = Annotated[Int, Field(ge=0, le=MOST)]
Penalty = Annotated[Real, Field(ge=-1e6, le=1e6)]  # logits are FP32: beyond, they would not stay finite
Seconds = Annotated[Real, Field(gt=0, le=MOST)]
Share = Annotated[Real, Field(gt=0, le=1)]
ANY = object()  # in a table of upstream names: every value is taken, and none changes anything here


@dataclass(frozen=True)
class Flag:
    """Beside a field: it has a flag of the command line, made from its name, its type and this.

    serve_only: of `serve` alone; else of every command that runs a model.
    """

    help: str
    metavar: str | None = None
    serve_only: bool = False


class Choices(BaseModel):
    """A frozen set of named choices. Subclasses say which other names they take for their fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    aliases: ClassVar[Mapping[str, str]] = {}
    # Upstream names without a counterpart here, and the values that ask for nothing.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init__(self, **values: Any):
        values = self.canonical(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(type(self).__name__, error)) from None

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values under the fields' own names. Raises ValueError for a name that is not known or given twice."""
        result: dict[str, Any] = {}
        for name, value in values.items():
            field = cls.aliases.get(name, name)
            if name in cls.neutral:
                accepted = cls.neutral[name]
                if accepted != (ANY,) and value is not None and value not in accepted:
                    raise ValueError(f"{cls.__name__}: {name}={value!r} is not offered here; leave {name} out")
            elif field not in cls.model_fields:
                known = [*cls.model_fields, *cls.aliases, *cls.neutral]
                raise ValueError(f"{cls.__name__} has no setting {name!r}{did_you_mean(name, known)}")
            elif field in result and differ(result[field], value):
                given = next(other for other in values if cls.aliases.get(other, other) == field)
                raise ValueError(
                    f"{cls.__name__}: {given}={result[field]!r} and {name}={value!r} are the same setting; give one"
                )
            else:
                result[field] = value
        return result


def differ(one: Any, other: Any) -> bool:
    return one is not other and one != other  # a NaN is the same setting as itself


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentence(owner: str, error: ValidationError) -> str:
    """The first mistake as one sentence."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if first["type"] == "value_error":  # a check of ours, or a nested object's whole sentence
        return str(context["error"])
    path = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "is-instance", "tuple["))]
    where, value = ".".join(path), first["input"]
    if first["type"] == "missing":
        return f"{owner}: {where} is missing"
    rules = {
        "greater_than": "above {gt:g}",
        "greater_than_equal": "at least {ge:g}",
        "less_than": "below {lt:g}",
        "less_than_equal": "at most {le}",
        "finite_number": "a finite number",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a text",
        "string_pattern_mismatch": "auto, cpu, cuda or cuda:0",  # device alone has a pattern
        "string_too_short": "a text that is not empty",
        "literal_error": "one of {expected}",
        "model_type": "a mapping of settings",
        "tuple_type": "a list",
        "too_short": "a list that is not empty",
    }
    rule = rules.get(first["type"])
    should = f"must be {rule.format(**context)}" if rule else f"is refused: {first['msg'].lower()}"
    shown = repr(value)
    return f"{owner}: {where}={shown if len(shown) <= 60 else shown[:57] + '...'} {should}"


def refuse(sentence: str) -> NoReturn:
    raise ValueError(sentence)
