from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("call", "header", "payload_bytes", "padding", "payload")
    CALL_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    call: int
    header: bytes
    payload_bytes: int
    padding: bytes
    payload: bytes
    def __init__(self, call: _Optional[int] = ..., header: _Optional[bytes] = ..., payload_bytes: _Optional[int] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Clock(_message.Message):
    __slots__ = ("generation", "step", "rank", "workers", "staleness", "sync")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    rank: int
    workers: int
    staleness: int
    sync: bool
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., workers: _Optional[int] = ..., staleness: _Optional[int] = ..., sync: _Optional[bool] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("slab", "index_bytes", "blocks", "counts", "learning_rate")
    SLAB_FIELD_NUMBER: _ClassVar[int]
    INDEX_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    slab: int
    index_bytes: int
    blocks: bytes
    counts: bytes
    learning_rate: float
    def __init__(self, slab: _Optional[int] = ..., index_bytes: _Optional[int] = ..., blocks: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("push", "epoch", "clock", "parts", "client", "sequence", "timeout_ms")
    PUSH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    push: bool
    epoch: int
    clock: Clock
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    client: int
    sequence: int
    timeout_ms: int
    def __init__(self, push: _Optional[bool] = ..., epoch: _Optional[int] = ..., clock: _Optional[_Union[Clock, _Mapping]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., client: _Optional[int] = ..., sequence: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("statuses", "refusal", "message", "block_map")
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_MAP_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[bytes]
    refusal: str
    message: str
    block_map: BlockMap
    def __init__(self, statuses: _Optional[_Iterable[bytes]] = ..., refusal: _Optional[str] = ..., message: _Optional[str] = ..., block_map: _Optional[_Union[BlockMap, _Mapping]] = ...) -> None: ...

class BlockMap(_message.Message):
    __slots__ = ("epoch", "owners", "addresses")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    owners: bytes
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., owners: _Optional[bytes] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("method", "arguments")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    method: str
    arguments: str
    def __init__(self, method: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class ControlReply(_message.Message):
    __slots__ = ("result", "error")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    result: str
    error: str
    def __init__(self, result: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class TransferRequest(_message.Message):
    __slots__ = ("blocks", "changes", "seal", "move")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    changes: bool
    seal: bool
    move: str
    def __init__(self, blocks: _Optional[_Iterable[int]] = ..., changes: _Optional[bool] = ..., seal: _Optional[bool] = ..., move: _Optional[str] = ...) -> None: ...
