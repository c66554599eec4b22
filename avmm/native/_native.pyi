"""Types of `avmm.native._native`, written from build.py by avmm.native.stubs: not to be edited."""

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

class CharPointer(Pointer[bytes]): ...
class CharArray(Array[bytes, CharPointer]): ...
class IntPointer(Pointer[int]): ...
class IntArray(Array[int, IntPointer]): ...
class Int64Pointer(Pointer[int]): ...
class Int64Array(Array[int, Int64Pointer]): ...
class Uint16Pointer(Pointer[int]): ...
class Uint16Array(Array[int, Uint16Pointer]): ...
class Uint32Pointer(Pointer[int]): ...
class Uint32Array(Array[int, Uint32Pointer]): ...
class Uint64Pointer(Pointer[int]): ...
class Uint64Array(Array[int, Uint64Pointer]): ...
class Uint8Pointer(Pointer[int]): ...
class Uint8Array(Array[int, Uint8Pointer]): ...

class AvmmRamRegion(CData):
    gpa: int
    size: int
    offset: int
    host: Uint8Pointer

class AvmmRamRegionPointer(AvmmRamRegion, Pointer[AvmmRamRegion]): ...
class AvmmRamRegionArray(Array[AvmmRamRegion, AvmmRamRegionPointer]): ...

class AvmmRamRegionInit(TypedDict, total=False):
    gpa: int
    size: int
    offset: int
    host: Uint8Pointer | Uint8Array

class AvmmRam(CData):
    count: int
    dirty: Uint64Pointer
    regions: AvmmRamRegionArray

class AvmmRamPointer(AvmmRam, Pointer[AvmmRam]): ...
class AvmmRamArray(Array[AvmmRam, AvmmRamPointer]): ...

class AvmmRamInit(TypedDict, total=False):
    count: int
    dirty: Uint64Pointer | Uint64Array
    regions: Sequence[AvmmRamRegionInit]

class AvmmPart(CData):
    offset: int
    length: int

class AvmmPartPointer(AvmmPart, Pointer[AvmmPart]): ...
class AvmmPartArray(Array[AvmmPart, AvmmPartPointer]): ...

class AvmmPartInit(TypedDict, total=False):
    offset: int
    length: int

class AvmmVring(CData):
    ram: AvmmRamPointer
    desc: int
    avail: int
    used: int
    size: int
    event_idx: int
    indirect: int
    signalled_once: int
    next_avail: int
    next_used: int
    signalled: int
    head: int
    readable: int
    writable: int
    sent: int
    parts: AvmmPartArray

class AvmmVringPointer(AvmmVring, Pointer[AvmmVring]): ...

class AvmmVringInit(TypedDict, total=False):
    ram: AvmmRamPointer | AvmmRamArray
    desc: int
    avail: int
    used: int
    size: int
    event_idx: int
    indirect: int
    signalled_once: int
    next_avail: int
    next_used: int
    signalled: int
    head: int
    readable: int
    writable: int
    sent: int
    parts: Sequence[AvmmPartInit]

class AvmmRun(CData):
    page: int
    count: int
    kind: int

class AvmmRunPointer(AvmmRun, Pointer[AvmmRun]): ...

class AvmmRunInit(TypedDict, total=False):
    page: int
    count: int
    kind: int

_TypeName: TypeAlias = Literal[
    "char",
    "int",
    "int64_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
    "uint8_t",
    "struct avmm_ram_region",
    "struct avmm_ram",
    "struct avmm_part",
    "struct avmm_vring",
    "struct avmm_run",
]

class FFI:
    NULL: Final[Address]
    errno: int
    @overload
    def new(
        self, c_type: Literal["struct avmm_ram_region *"], init: AvmmRamRegionInit = ..., /
    ) -> AvmmRamRegionPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_ram *"], init: AvmmRamInit = ..., /
    ) -> AvmmRamPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_part *"], init: AvmmPartInit = ..., /
    ) -> AvmmPartPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_vring *"], init: AvmmVringInit = ..., /
    ) -> AvmmVringPointer: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_run *"], init: AvmmRunInit = ..., /
    ) -> AvmmRunPointer: ...
    @overload
    def new(
        self,
        c_type: Literal["struct avmm_ram_region[]"],
        init: int | Sequence[AvmmRamRegionInit],
        /,
    ) -> AvmmRamRegionArray: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_ram[]"], init: int | Sequence[AvmmRamInit], /
    ) -> AvmmRamArray: ...
    @overload
    def new(
        self, c_type: Literal["struct avmm_part[]"], init: int | Sequence[AvmmPartInit], /
    ) -> AvmmPartArray: ...
    @overload
    def new(self, c_type: Literal["char *"], init: bytes = ..., /) -> CharPointer: ...
    @overload
    def new(self, c_type: Literal["char[]"], init: int | Sequence[bytes], /) -> CharArray: ...
    @overload
    def new(self, c_type: Literal["int *"], init: int = ..., /) -> IntPointer: ...
    @overload
    def new(self, c_type: Literal["int[]"], init: int | Sequence[int], /) -> IntArray: ...
    @overload
    def new(self, c_type: Literal["int64_t *"], init: int = ..., /) -> Int64Pointer: ...
    @overload
    def new(self, c_type: Literal["int64_t[]"], init: int | Sequence[int], /) -> Int64Array: ...
    @overload
    def new(self, c_type: Literal["uint16_t *"], init: int = ..., /) -> Uint16Pointer: ...
    @overload
    def new(self, c_type: Literal["uint16_t[]"], init: int | Sequence[int], /) -> Uint16Array: ...
    @overload
    def new(self, c_type: Literal["uint32_t *"], init: int = ..., /) -> Uint32Pointer: ...
    @overload
    def new(self, c_type: Literal["uint32_t[]"], init: int | Sequence[int], /) -> Uint32Array: ...
    @overload
    def new(self, c_type: Literal["uint64_t *"], init: int = ..., /) -> Uint64Pointer: ...
    @overload
    def new(self, c_type: Literal["uint64_t[]"], init: int | Sequence[int], /) -> Uint64Array: ...
    @overload
    def new(self, c_type: Literal["uint8_t *"], init: int = ..., /) -> Uint8Pointer: ...
    @overload
    def new(self, c_type: Literal["uint8_t[]"], init: int | Sequence[int], /) -> Uint8Array: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_ram_region *"], value: Address | int, /
    ) -> AvmmRamRegionPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_ram *"], value: Address | int, /
    ) -> AvmmRamPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_part *"], value: Address | int, /
    ) -> AvmmPartPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_vring *"], value: Address | int, /
    ) -> AvmmVringPointer: ...
    @overload
    def cast(
        self, c_type: Literal["struct avmm_run *"], value: Address | int, /
    ) -> AvmmRunPointer: ...
    @overload
    def cast(self, c_type: Literal["char *"], value: Address | int, /) -> CharPointer: ...
    @overload
    def cast(self, c_type: Literal["int *"], value: Address | int, /) -> IntPointer: ...
    @overload
    def cast(self, c_type: Literal["int64_t *"], value: Address | int, /) -> Int64Pointer: ...
    @overload
    def cast(self, c_type: Literal["uint16_t *"], value: Address | int, /) -> Uint16Pointer: ...
    @overload
    def cast(self, c_type: Literal["uint32_t *"], value: Address | int, /) -> Uint32Pointer: ...
    @overload
    def cast(self, c_type: Literal["uint64_t *"], value: Address | int, /) -> Uint64Pointer: ...
    @overload
    def cast(self, c_type: Literal["uint8_t *"], value: Address | int, /) -> Uint8Pointer: ...
    @overload
    def cast(self, c_type: Literal["uintptr_t"], value: Address, /) -> Number: ...
    @overload
    def from_buffer(self, data: Buffer, /, require_writable: bool = ...) -> CharArray: ...
    @overload
    def from_buffer(
        self,
        c_type: Literal["struct avmm_ram_region[]"],
        data: Buffer,
        /,
        require_writable: bool = ...,
    ) -> AvmmRamRegionArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["struct avmm_ram[]"], data: Buffer, /, require_writable: bool = ...
    ) -> AvmmRamArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["struct avmm_part[]"], data: Buffer, /, require_writable: bool = ...
    ) -> AvmmPartArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["char[]"], data: Buffer, /, require_writable: bool = ...
    ) -> CharArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["int[]"], data: Buffer, /, require_writable: bool = ...
    ) -> IntArray: ...
    @overload
    def from_buffer(
        self, c_type: Literal["int64_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Int64Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint16_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint16Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint32_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint32Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint64_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint64Array: ...
    @overload
    def from_buffer(
        self, c_type: Literal["uint8_t[]"], data: Buffer, /, require_writable: bool = ...
    ) -> Uint8Array: ...
    def buffer(self, data: Address, size: int = ..., /) -> CBuffer: ...
    def sizeof(self, what: CData | CType | _TypeName, /) -> int: ...
    def typeof(self, name: _TypeName, /) -> CType: ...
    def offsetof(self, name: _TypeName, field: str, /) -> int: ...
    @overload
    def addressof(self, array: Array[_Item, _Decayed], at: int, /) -> _Decayed: ...
    @overload
    def addressof(self, lib: Lib, function: str, /) -> Address: ...
    def memmove(self, to: Address | Buffer, from_: Address | Buffer, size: int, /) -> None: ...
    def release(self, data: CData, /) -> None: ...
    def gc(
        self, data: _Decayed, destructor: Callable[[_Decayed], None], size: int, /
    ) -> _Decayed: ...

class Lib:
    AVMM_RAM_REGIONS: Final[int]
    AVMM_VRING_SHAPE: Final[int]
    AVMM_VRING_PLACE: Final[int]
    AVMM_VRING_AHEAD: Final[int]
    AVMM_VRING_INDEX: Final[int]
    AVMM_VRING_LOOP: Final[int]
    AVMM_VRING_OUTSIDE: Final[int]
    AVMM_VRING_ORDER: Final[int]
    AVMM_VRING_LENGTH: Final[int]
    AVMM_VRING_PARTS_MAX: Final[int]
    AVMM_VRING_INDIRECT: Final[int]
    AVMM_VRING_TABLE: Final[int]
    FALLOC_FL_KEEP_SIZE: Final[int]
    FALLOC_FL_PUNCH_HOLE: Final[int]
    FALLOC_FL_ZERO_RANGE: Final[int]
    MAP_NORESERVE: Final[int]
    AVMM_PAGE: Final[int]
    AVMM_RUN_ZERO: Final[int]
    AVMM_RUN_DATA: Final[int]
    def avmm_ram_log(
        self, arg0: AvmmRamPointer | AvmmRamArray, arg1: Uint64Pointer | Uint64Array, /
    ) -> None: ...
    def avmm_ram_watch(
        self, arg0: AvmmRamPointer | AvmmRamArray, arg1: int, arg2: int, /
    ) -> None: ...
    def avmm_ram_wrote(
        self, arg0: AvmmRamPointer | AvmmRamArray, arg1: int, arg2: int, /
    ) -> None: ...
    def avmm_vring_check(self, arg0: AvmmVringPointer, /) -> int: ...
    def avmm_vring_walk(self, arg0: AvmmVringPointer, arg1: int, /) -> int: ...
    def avmm_vring_mark(self, arg0: AvmmVringPointer, arg1: int, /) -> None: ...
    def avmm_vring_pop(self, arg0: AvmmVringPointer, /) -> int: ...
    def avmm_vring_push(
        self, arg0: AvmmVringPointer, arg1: int, arg2: int, arg3: int, /
    ) -> int: ...
    def avmm_vring_wants_interrupt(self, arg0: AvmmVringPointer, /) -> int: ...
    def avmm_vring_listen(self, arg0: AvmmVringPointer, arg1: int, /) -> int: ...
    def avmm_vring_send(
        self, arg0: AvmmVringPointer, arg1: int, arg2: int, arg3: int, /
    ) -> int: ...
    def fallocate(self, arg0: int, arg1: int, arg2: int, arg3: int, /) -> int: ...
    def avmm_pages_run(
        self,
        arg0: Uint64Pointer | Uint64Array,
        arg1: int,
        arg2: int,
        arg3: Uint64Pointer | Uint64Array,
        /,
    ) -> int: ...
    def avmm_pages_pack(
        self,
        arg0: Uint8Pointer | Uint8Array,
        arg1: Uint64Pointer | Uint64Array,
        arg2: int,
        arg3: Uint64Pointer | Uint64Array,
        arg4: AvmmRunPointer,
        arg5: int,
        arg6: Uint8Pointer | Uint8Array,
        arg7: int,
        arg8: int,
        arg9: Uint32Pointer | Uint32Array,
        /,
    ) -> int: ...
    def avmm_pages_unpack(
        self,
        arg0: Uint8Pointer | Uint8Array,
        arg1: int,
        arg2: int,
        arg3: AvmmRunPointer,
        arg4: int,
        arg5: Uint8Pointer | Uint8Array,
        arg6: int,
        /,
    ) -> int: ...
    def avmm_dirty_mark(
        self, arg0: Uint64Pointer | Uint64Array, arg1: int, arg2: int, /
    ) -> None: ...
    def avmm_dirty_take(
        self, arg0: Uint64Pointer | Uint64Array, arg1: Uint64Pointer | Uint64Array, arg2: int, /
    ) -> None: ...
    def avmm_pages_add(
        self, arg0: Uint64Pointer | Uint64Array, arg1: Uint64Pointer | Uint64Array, arg2: int, /
    ) -> None: ...
    def avmm_pages_count(self, arg0: Uint64Pointer | Uint64Array, arg1: int, /) -> int: ...
    def avmm_map_private(self, arg0: int, arg1: int, arg2: int, arg3: int, /) -> int: ...
    def avmm_pagemap_own(
        self,
        arg0: Uint64Pointer | Uint64Array,
        arg1: int,
        arg2: int,
        arg3: Uint64Pointer | Uint64Array,
        /,
    ) -> None: ...

ffi: FFI
lib: Lib
