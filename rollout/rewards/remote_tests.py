"""Test code in one process, the program that it tests in another: only plain data goes between the two.

What the program defines is a `Remote` in the tests' process: calling it, or asking for an attribute, an item or its
text, is a question to the program. Answers are copies: numbers, texts, containers, arrays, dates. An instance of one of
the program's classes stays a Remote. So an assertion on values is decided in the tests' process, and the program cannot
reach what decides. What the program is not asked, since the question would hold what is right: whether an object of its
own equals, or is more or less than, or differs by how much from a value of the tests. A list, dict or set that the
program changes in place is changed in the tests' process too. Functions of the tests may be given to the program.

Standard library alone; loaded by `isolated_main`.
"""

import asyncio
import builtins
import collections
import datetime
import decimal
import fractions
import inspect
import json
import operator
import os
import sys

_MAX_BYTES = 64 << 20
_COPIED = {
    "deque": (collections.deque, lambda value: [list(value), value.maxlen]),
    "Counter": (collections.Counter, lambda value: [dict(value)]),
    "OrderedDict": (collections.OrderedDict, lambda value: [[list(item) for item in value.items()]]),
    "defaultdict": (collections.defaultdict, lambda value: [None, dict(value)]),
    "Decimal": (decimal.Decimal, lambda value: [str(value)]),
    "Fraction": (fractions.Fraction, lambda value: [value.numerator, value.denominator]),
    "range": (range, lambda value: [value.start, value.stop, value.step]),
    "complex": (complex, lambda value: [value.real, value.imag]),
    "timedelta": (datetime.timedelta, lambda value: [value.days, value.seconds, value.microseconds]),
    "date": (datetime.date, lambda value: [value.year, value.month, value.day]),
    "time": (datetime.time, lambda value: [value.hour, value.minute, value.second, value.microsecond]),
}
_NAME_OF = {kind: name for name, (kind, _) in _COPIED.items()}
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_BINARY = "add sub mul truediv floordiv mod pow lshift rshift and or xor matmul".split()  # noqa: SIM905
_ASKED = {
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in (*_BINARY, "neg", "pos", "abs", "invert")},
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in ("lt", "le", "gt", "ge")},
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in ("getitem", "setitem", "delitem", "contains")},
    **{f"__{name}__": getattr(builtins, name) for name in ("len", "iter", "next", "repr", "str", "bool", "hash")},
    **{f"__{name}__": getattr(builtins, name) for name in ("int", "float", "reversed", "format", "round")},
    "__index__": operator.index,
    "__enter__": lambda value: value.__enter__(),
    "__exit__": lambda value, *error: value.__exit__(None, None, None),
}
_COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__")
_NUMBERS = (
    *_COMPARISONS,
    "__abs__",
    "__neg__",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__round__",
    "__len__",
)


class _Peer:
    """Asks the other side, and answers what it asks meanwhile."""

    def __init__(self, descriptor: int):
        self._in, self._out = os.fdopen(descriptor, "rb"), os.fdopen(os.dup(descriptor), "wb")
        self._kept = {}  # what the other side has handles of

    def ask(self, kind: str, *values):
        self._send("ask", kind, [self.encoded(value) for value in values])
        while True:
            what, *rest = self._receive()
            if what == "ask":
                self._answer(*rest)
            elif what == "value":
                return self.decoded(rest[0])
            else:
                raise self.error(*rest)

    def serve(self) -> None:
        """Until the other side ends."""
        while True:
            try:
                _, kind, values = self._receive()
            except EOFError:
                return
            self._answer(kind, values)

    def _answer(self, kind: str, values: list) -> None:
        try:
            answer = "value", self.encoded(getattr(self, f"answer_{kind}")(*map(self.decoded, values)))
        except BaseException as error:
            answer = "error", *self.described(error)
        self._send(*answer)

    def answer_call(self, function, arguments, options):
        """The result, and the arguments as they are now: the other side changes its own."""
        return function(*arguments, **options), arguments, options

    def described(self, error: BaseException) -> tuple:
        """(name of the nearest built-in class, encoded class where it is not built in, text)."""
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
        try:
            text = str(error)
        except BaseException:
            text = ""
        return kind.__name__, None if kind is type(error) else self.encoded(type(error)), text

    def error(self, name: str, kind, text: str) -> BaseException:
        found = self.decoded(kind) if kind is not None else getattr(builtins, str(name), None)
        if not (isinstance(found, type) and issubclass(found, Exception)):
            found = RuntimeError
        try:
            return found(text)
        except TypeError:  # some want more than a text
            return RuntimeError(f"{name}: {text}")

    def encoded(self, value):
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            return ["int", hex(value)]
        if kind in (bytes, bytearray):
            return [kind.__name__, value.hex()]
        if kind is datetime.datetime:
            return ["datetime", value.isoformat()]
        if kind.__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biufcSU":
            is_array = kind.__name__ == "ndarray"
            return ["numpy", is_array, value.dtype.str, list(value.shape), value.tobytes().hex()]
        items = self._encoded_items(value)
        return self.encoded_object(value) if items is None else items

    def _encoded_items(self, value):
        """Of a container, and of what is made from parts; None for anything else."""
        kind = type(value)
        if kind in _CONTAINERS.values():
            return [kind.__name__, [self.encoded(item) for item in value]]
        if kind is dict:
            return ["dict", [[self.encoded(key), self.encoded(item)] for key, item in value.items()]]
        if kind in _NAME_OF:
            name = _NAME_OF[kind]
            return ["copied", name, [self.encoded(item) for item in _COPIED[name][1](value)]]
        return None

    def decoded(self, data):
        if not isinstance(data, list):
            return data
        kind, *rest = data
        if kind == "int":
            return int(rest[0], 16)
        if kind in ("bytes", "bytearray"):
            return getattr(builtins, kind).fromhex(rest[0])
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](map(self.decoded, rest[0]))
        if kind == "dict":
            return {self.decoded(key): self.decoded(item) for key, item in rest[0]}
        if kind == "copied":
            return _COPIED[rest[0]][0](*map(self.decoded, rest[1]))
        if kind == "datetime":
            return datetime.datetime.fromisoformat(rest[0])
        if kind == "numpy":
            import numpy  # only where the program or the tests use it

            is_array, dtype, shape, data = rest
            array = numpy.frombuffer(bytes.fromhex(data), dtype).reshape(shape)
            return array.copy() if is_array else array[()]
        return self.decoded_object(kind, *rest)

    def keep(self, value) -> int:
        self._kept[id(value)] = value
        return id(value)

    def _send(self, *message) -> None:
        data = json.dumps(message).encode()
        self._out.write(len(data).to_bytes(4, "little") + data)
        self._out.flush()

    def _receive(self) -> list:
        size = int.from_bytes(self._in.read(4), "little")
        data = self._in.read(size) if 0 < size <= _MAX_BYTES else b""
        if not data:
            raise EOFError("the program has ended")
        return json.loads(data)


class Program(_Peer):
    """The program's side, which does whatever the tests ask."""

    def __init__(self, descriptor: int, namespace: dict):
        super().__init__(descriptor)
        self._namespace = namespace

    def answer_names(self):
        return [name for name in self._namespace if not name.startswith("__")]

    def answer_name(self, name):
        return self._namespace[name]

    def answer_get(self, value, name):
        return getattr(value, name)

    def answer_set(self, value, name, new):
        setattr(value, name, new)

    def answer_operator(self, value, name, others):
        return _ASKED[name](value, *others)

    def answer_reflected(self, value, name, other):
        return _ASKED[name](other, value)

    def answer_equal(self, value, other):
        return bool(value == other)

    def answer_isinstance(self, value, kind):
        return isinstance(value, kind)

    def answer_await(self, value):
        return asyncio.run(value)

    def encoded_object(self, value):
        if isinstance(value, type) and issubclass(value, BaseException):
            base = next(kind for kind in value.__mro__ if kind.__module__ == "builtins")
            return ["exception", self.keep(value), value.__name__, base.__name__]
        if inspect.iscoroutine(value):
            return ["awaitable", self.keep(value)]
        base = next((kind for kind in (bool, int, float, str, bytes, list, tuple, dict, set, frozenset)
                     if isinstance(value, kind)), None)  # fmt: skip
        plain = None if base is None else self.encoded(base(value) if base is not dict else dict(value.items()))
        return ["remote", self.keep(value), plain, callable(value)]

    def decoded_object(self, kind, handle, *rest):
        if kind == "own":
            return self._kept[handle]
        return lambda *arguments, **options: self.ask("call", handle, list(arguments), options)[0]


class Tests(_Peer):
    """The tests' side, which answers calls of the functions that it gave away, and nothing else."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor)
        self._classes = {}

    def answer_call(self, handle, arguments, options):
        return super().answer_call(self._kept[handle], arguments, options)

    def call(self, remote, arguments: tuple, options: dict):
        result, now, options_now = self.ask("call", remote, list(arguments), options)
        for old, new in [*zip(arguments, now, strict=True), *((options[name], options_now[name]) for name in options)]:
            if type(old) is type(new) and old != new:
                if type(old) is list:
                    old[:] = new
                elif type(old) in (dict, set):
                    old.clear()
                    old.update(new)
        return result

    def encoded_object(self, value):
        if isinstance(value, Remote):
            return ["own", object.__getattribute__(value, "_handle")]
        if value in self._classes.values():
            return ["own", next(handle for handle, kind in self._classes.items() if kind is value)]
        if inspect.isfunction(value) or inspect.isbuiltin(value) or inspect.ismethod(value) or isinstance(value, type):
            return ["function", self.keep(value)]
        raise TypeError(f"the program cannot be given a {type(value).__name__}: its tests run apart from it")

    def decoded_object(self, kind, handle, *rest):
        if kind == "exception":
            name, base = rest
            base = getattr(builtins, base)
            if handle not in self._classes:
                self._classes[handle] = type(str(name), (base if issubclass(base, BaseException) else Exception,), {})
            return self._classes[handle]
        if kind == "awaitable":
            return self._awaited(handle)
        return Remote(self, handle, self.decoded(rest[0]), rest[1])

    async def _awaited(self, handle):
        return self.ask("await", Remote(self, handle, None, False))


class Remote:
    """An object of the program's. plain: its value as a built-in type, of which its class is a subclass; or None."""

    def __init__(self, peer: Tests, handle: int, plain, is_callable: bool):
        for name, value in (("_peer", peer), ("_handle", handle), ("_plain", plain), ("_is_derived", False)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name):
        return self._peer.ask("get", self, name)

    def __setattr__(self, name, value):
        self._peer.ask("set", self, name, value)

    def __call__(self, *arguments, **options):
        return self._peer.call(self, arguments, options)

    def __eq__(self, other):
        if isinstance(other, Remote):
            return self._handle == other._handle or self._peer.ask("equal", self, other) is True
        return self._plain is not None and self._plain == other

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and self._peer.ask("isinstance", value, self) is True


def _asked(name):
    def asked(self, *others):
        if name in _COMPARISONS and not isinstance(others[0], Remote):
            return NotImplemented if self._plain is None else _ASKED[name](self._plain, *others)
        if self._is_derived and name in _NUMBERS:
            raise TypeError("a number of an object that the program made from a value of its tests")
        result = self._peer.ask("operator", self, name, list(others))
        return _derived(result, *others) if name.strip("_") in _BINARY else result

    return asked


def _reflected(name):
    return lambda self, other: _derived(self._peer.ask("reflected", self, name, other), other)


def _derived(result, other):
    """What the program made of an object of its own and a value of the tests is not plain and becomes no number."""
    if not isinstance(other, Remote):
        if not isinstance(result, Remote):
            raise TypeError("the program made a plain value from one of its tests")
        object.__setattr__(result, "_is_derived", True)
    return result


for _name in _ASKED:
    setattr(Remote, _name, _asked(_name))
for _name in _BINARY:
    setattr(Remote, f"__r{_name}__", _reflected(f"__{_name}__"))


def serve_program(program: str, descriptor: int) -> None:
    """Runs the program as the main module and answers questions about it until the tests end."""
    namespace = sys.modules["__main__"].__dict__
    peer = Program(descriptor, namespace)
    try:
        exec(compile(program, "program.py", "exec"), namespace)
        error = None
    except BaseException as raised:
        error = raised

    def names():
        if error is not None:
            raise error
        return Program.answer_names(peer)

    peer.answer_names = names
    peer.serve()


def run_tests(tests: str, descriptor: int) -> None:
    """Raises what the tests raise, or what the program raised while it was loaded."""
    peer = Tests(descriptor)
    namespace = sys.modules["__main__"].__dict__
    for name in peer.ask("names"):
        if isinstance(name, str) and not hasattr(builtins, name):
            namespace[name] = peer.ask("name", name)
    exec(compile(tests, "tests.py", "exec"), namespace)
