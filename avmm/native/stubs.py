"""Writes the types of the compiled modules (`_kvm.pyi` and others) from the declarations in their
build.py.

    python avmm/native/stubs.py          # after a change of these

Used by people and by a test, not at run time. It reads the declarations as cffi has parsed them
for the build, so the types cannot differ from the compiled code. Each C type gets a class of its
own, so that a `uint32_t *` is not accepted where a `uint64_t *` is needed:

- a structure `struct a_b` becomes `AB` with its fields, a pointer to it `ABPointer`, which has
  the fields, too (cffi looks through a pointer), and what `ffi.new` takes to fill it `ABInit`;
- a number `uint64_t` is an `int`; its pointers and arrays are `Uint64Pointer`, `Uint64Array`.

A null pointer of a type is `ffi.cast("uint64_t *", 0)`; `ffi.NULL` fits a `void *` only. `const`
is left out, as cffi ignores it.
"""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cffi import FFI, model

_WIDTH: Final = 99
_PACKAGE: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class StubModule:
    """A compiled module: where its types go, and which groups of constants get a type for their
    names."""

    path: Path
    names: Mapping[str, str] = field(default_factory=dict)
    """The name of a type → the prefix of the constants whose names it allows."""

    @property
    def name(self) -> str:
        """The name under which Python imports it."""
        return ".".join(self.path.relative_to(_PACKAGE.parent).with_suffix("").parts)


MODULES: Final = (
    StubModule(_PACKAGE / "kvm/_kvm.pyi", {"Constant": "KVM_", "Capability": "KVM_CAP_"}),
    StubModule(_PACKAGE / "native/_native.pyi"),
    StubModule(_PACKAGE / "soft/_soft.pyi"),
)

_HEAD: Final = '''\
"""Types of `{name}`, written from build.py by avmm.native.stubs: not to be edited."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, Literal, Self, TypeAlias, TypedDict, TypeVar, overload

from typing_extensions import Buffer

_Item = TypeVar("_Item")
_Decayed = TypeVar("_Decayed")

class CData:
    """A C object: a structure, a pointer, an array or a number."""

class Number(CData):
    """A pointer or number that was cast to a number."""

    def __int__(self) -> int: ...

class Address(CData):
    """A pointer, or an array, which C converts to one."""

    def __bool__(self) -> bool: ...

class Pointer(Address, Generic[_Item]):
    def __getitem__(self, at: int, /) -> _Item: ...
    def __setitem__(self, at: int, value: _Item, /) -> None: ...
    def __add__(self, items: int, /) -> Self: ...

class Array(Address, Generic[_Item, _Decayed]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_Item]: ...
    @overload
    def __getitem__(self, at: int, /) -> _Item: ...
    @overload
    def __getitem__(self, at: slice, /) -> Self: ...
    @overload
    def __setitem__(self, at: int, value: _Item, /) -> None: ...
    @overload
    def __setitem__(self, at: slice, value: Sequence[_Item], /) -> None: ...
    def __add__(self, items: int, /) -> _Decayed: ...

class CBuffer(Buffer):
    def __len__(self) -> int: ...
    def __getitem__(self, at: slice, /) -> bytes: ...
    def __setitem__(self, at: slice, value: Buffer, /) -> None: ...

class CField:
    type: Final[CType]
    offset: Final[int]

class CType:
    fields: Final[Sequence[tuple[str, CField]]]
'''


def write() -> None:
    """Write the types of all modules to where type checkers look for them."""
    for module in MODULES:
        module.path.write_text(text(module))


def text(module: StubModule) -> str:
    """The text of one module's .pyi file."""
    # Imported by its path, because avmm may not be importable while the types do not fit.
    builder: FFI = runpy.run_path(str(module.path.with_name("build.py")))["ffibuilder"]
    # cffi has no public access to the declarations that it has parsed. Only a compiled module
    # shows them, and only for its own platform.
    declared: Mapping[str, tuple[Any, int]] = vars(vars(builder)["_parser"])["_declarations"]
    lines = "".join(line + "\n" for line in _Stub(module, declared).lines())
    return lines if "(TypedDict" in lines else lines.replace(" TypedDict,", "", 1)


class _Stub:
    """One module's declarations, sorted by what becomes of them."""

    def __init__(self, module: StubModule, declared: Mapping[str, tuple[Any, int]]) -> None:
        self._module = module
        self._constants: list[str] = []
        self._functions: dict[str, model.RawFunctionType] = {}
        self._structs: dict[str, model.StructOrUnion] = {}
        self._numbers = {"char"}
        self._arrays: set[str] = set()
        """The C names of the structures that occur in arrays."""
        for key, (what, _) in declared.items():
            kind, name = key.split(" ", 1)
            if kind == "macro":
                self._constants.append(name)
            elif kind == "function":
                self._functions[name] = what
            elif kind in ("struct", "union", "anonymous", "typedef"):
                self._structs[_c_name(what)] = what
            else:
                raise ValueError(f"{module.name}: no types are known for {key}")
        for struct in self._structs.values():
            for type_ in struct.fldtypes or ():
                self._note(type_)
                if isinstance(inner := _inner(type_), model.StructOrUnion) and inner is not type_:
                    self._arrays.add(_c_name(inner))
        for function in self._functions.values():
            for type_ in (*function.args, function.result):
                self._note(type_)

    def _note(self, type_: model.BaseTypeByIdentity) -> None:
        if isinstance(inner := _inner(type_), model.PrimitiveType):
            self._numbers.add(inner.name)

    def lines(self) -> Iterator[str]:
        """All lines of the file."""
        yield from _HEAD.format(name=self._module.name).splitlines()
        yield ""
        classes = [*self._number_classes()]
        for c_name, struct in self._structs.items():
            classes += self._struct_classes(c_name, struct)
        for before, lines in itertools.pairwise([[], *classes]):
            if len(before) > 1 or (before and len(lines) > 1):
                yield ""  # as `ruff format` does
            yield from lines
        yield ""
        yield from _literal("_TypeName", [*sorted(self._numbers), *self._structs])
        for name, prefix in self._module.names.items():
            yield from _literal(name, [c for c in self._constants if c.startswith(prefix)])
        yield ""
        yield from self._ffi()
        yield ""
        yield from self._lib()
        yield ""
        yield "ffi: FFI"
        yield "lib: Lib"

    def _number_classes(self) -> Iterator[list[str]]:
        for number in sorted(self._numbers):
            item = "bytes" if number == "char" else "int"
            name = class_name(number)
            yield _class(f"{name}Pointer", [f"Pointer[{item}]"])
            yield _class(f"{name}Array", [f"Array[{item}, {name}Pointer]"])

    def _struct_classes(self, c_name: str, struct: model.StructOrUnion) -> Iterator[list[str]]:
        fields = list(zip(struct.fldnames or (), struct.fldtypes or (), strict=True))
        name = class_name(c_name)
        yield _class(name, ["CData"], [f"{n}: {self._field(t)}" for n, t in fields])
        yield _class(f"{name}Pointer", [name, f"Pointer[{name}]"])
        if c_name in self._arrays:
            yield _class(f"{name}Array", [f"Array[{name}, {name}Pointer]"])
        inits = [f"{n}: {self._init(t)}" for n, t in fields]
        yield _class(f"{name}Init", ["TypedDict", "total=False"], inits)

    @staticmethod
    def _field(type_: model.BaseTypeByIdentity) -> str:
        """The type that reading the field gives."""
        if isinstance(type_, model.ArrayType):
            return f"{class_name(_c_name(type_.item))}Array"
        if isinstance(type_, model.PointerType):
            return _pointer(type_)
        return _value(type_)

    def _init(self, type_: model.BaseTypeByIdentity) -> str:
        """The types that the field may be given in `ffi.new`."""
        if isinstance(type_, model.ArrayType):
            item = _value(type_.item)
            init = f"{item}Init" if isinstance(type_.item, model.StructOrUnion) else item
            # For an array without a length, `ffi.new` may also be given the length.
            return f"int | Sequence[{init}]" if type_.length is None else f"Sequence[{init}]"
        if isinstance(type_, model.StructOrUnion):
            return f"{_value(type_)}Init"
        return self._argument(type_)

    def _argument(self, type_: model.BaseTypeByIdentity) -> str:
        """The Python types that may be passed where C has this type."""
        if not isinstance(type_, model.PointerType):
            return _value(type_)
        pointer, inner = _pointer(type_), type_.totype
        if isinstance(inner, model.VoidType) or (
            isinstance(inner, model.StructOrUnion) and _c_name(inner) not in self._arrays
        ):
            return pointer
        return f"{pointer} | {class_name(_c_name(inner))}Array"

    def _ffi(self) -> Iterator[str]:
        yield "class FFI:"
        yield "    NULL: Final[Address]"
        yield "    errno: int"
        structs, arrays = list(self._structs), [s for s in self._structs if s in self._arrays]
        numbers = sorted(self._numbers)
        new = [(f"{s} *", f"init: {class_name(s)}Init = ...", "Pointer", s) for s in structs]
        new += [
            (f"{s}[]", f"init: int | Sequence[{class_name(s)}Init]", "Array", s) for s in arrays
        ]
        for number in numbers:
            item = "bytes" if number == "char" else "int"
            new.append((f"{number} *", f"init: {item} = ...", "Pointer", number))
            new.append((f"{number}[]", f"init: int | Sequence[{item}]", "Array", number))
        yield from _overloads("new", new)
        cast = [(f"{c} *", "value: Address | int", "Pointer", c) for c in (*structs, *numbers)]
        yield from _overloads("cast", [*cast, ("uintptr_t", "value: Address", "", "number")])
        yield "    @overload"
        yield from _function(
            "from_buffer",
            ["data: Buffer", "/", "require_writable: bool = ..."],
            "CharArray",
        )
        yield from _overloads(
            "from_buffer",
            [(f"{c}[]", "data: Buffer", "Array", c) for c in (*arrays, *numbers)],
            last="require_writable: bool = ...",
        )
        yield from _function("buffer", ["data: Address", "size: int = ...", "/"], "CBuffer")
        yield from _function("sizeof", ["what: CData | CType | _TypeName", "/"], "int")
        yield from _function("typeof", ["name: _TypeName", "/"], "CType")
        yield from _function("offsetof", ["name: _TypeName", "field: str", "/"], "int")
        yield "    @overload"
        yield from _function(
            "addressof", ["array: Array[_Item, _Decayed]", "at: int", "/"], "_Decayed"
        )
        yield "    @overload"
        yield from _function("addressof", ["lib: Lib", "function: str", "/"], "Address")
        to, from_ = "to: Address | Buffer", "from_: Address | Buffer"
        yield from _function("memmove", [to, from_, "size: int", "/"], "None")
        yield from _function("release", ["data: CData", "/"], "None")
        destructor = "destructor: Callable[[_Decayed], None]"
        yield from _function("gc", ["data: _Decayed", destructor, "size: int", "/"], "_Decayed")

    def _lib(self) -> Iterator[str]:
        yield "class Lib:"
        for name in self._constants:
            yield f"    {name}: Final[int]"
        for name, function in self._functions.items():
            taken = [f"arg{at}: {self._argument(type_)}" for at, type_ in enumerate(function.args)]
            gives = _value(function.result)
            yield from _function(name, [*taken, "/"] if taken else [], gives)


def _inner(type_: model.BaseTypeByIdentity) -> model.BaseTypeByIdentity:
    """The type that a pointer points to or that an array consists of; else the type itself."""
    if isinstance(type_, model.PointerType):
        return type_.totype
    if isinstance(type_, model.ArrayType):
        inner: model.BaseTypeByIdentity = type_.item
        return inner
    return type_


def _c_name(type_: model.BaseTypeByIdentity) -> str:
    """The type as C writes it, without `const`: "struct kvm_regs", "avmm_exit_io", "uint64_t"."""
    if isinstance(type_, model.StructOrUnion | model.PrimitiveType):
        return type_.get_c_name()
    raise ValueError(f"no types are known for {type_.get_c_name()}")


def class_name(c_name: str) -> str:
    """ "struct kvm_regs" → "KvmRegs", "uint64_t" → "Uint64", "unsigned long" → "UnsignedLong"."""
    words = c_name.removeprefix("struct ").removeprefix("union ").removesuffix("_t")
    return "".join(word.capitalize() for word in words.replace(" ", "_").split("_"))


def _value(type_: model.BaseTypeByIdentity) -> str:
    if isinstance(type_, model.VoidType):
        return "None"
    if isinstance(type_, model.PrimitiveType):
        return "bytes" if type_.name == "char" else "int"
    if isinstance(type_, model.StructOrUnion):
        return class_name(_c_name(type_))
    raise ValueError(f"no types are known for {type_.get_c_name()}")


def _pointer(type_: model.PointerType) -> str:
    if isinstance(type_.totype, model.VoidType):
        return "Address"
    return f"{class_name(_c_name(type_.totype))}Pointer"


def _class(name: str, bases: list[str], body: Sequence[str] = ()) -> list[str]:
    head = f"class {name}({', '.join(bases)}):"
    if len(head) + len(" ...") > _WIDTH:
        lines = [f"class {name}(", f"    {', '.join(bases)}", "):"]
    else:
        lines = [head]
    if not body:
        lines[-1] += " ..."
    return [*lines, *(f"    {line}" for line in body)]


def _literal(name: str, values: Iterable[str]) -> Iterator[str]:
    yield f"{name}: TypeAlias = Literal["
    for value in values:
        yield f'    "{value}",'
    yield "]"


def _overloads(
    name: str, cases: Iterable[tuple[str, str, str, str]], last: str = ""
) -> Iterator[str]:
    """One overload for each (text of the C type, parameter, ending of the class's name, C
    name)."""
    for c_type, parameter, ending, c_name in cases:
        parameters = [f'c_type: Literal["{c_type}"]', parameter, "/", *([last] if last else [])]
        yield "    @overload"
        yield from _function(name, parameters, class_name(c_name) + ending)


def _function(name: str, parameters: list[str], gives: str) -> Iterator[str]:
    """A method, broken into lines as `ruff format` does."""
    inside = ", ".join(["self", *parameters])
    whole = f"    def {name}({inside}) -> {gives}: ..."
    if len(whole) <= _WIDTH:
        yield whole
        return
    yield f"    def {name}("
    if 8 + len(inside) <= _WIDTH:
        yield f"        {inside}"
    else:
        for parameter in ("self", *parameters):
            yield f"        {parameter},"
    yield f"    ) -> {gives}: ..."


if __name__ == "__main__":
    write()
