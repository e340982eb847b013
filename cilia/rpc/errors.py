"""Domain errors over the wire: a kind is a status code, the rest travels as google.rpc details.

DomainError ──▶ status code + message + details:
                  google.rpc.ErrorInfo   reason = the class's name, domain "cilia", metadata.cure
                  cilia.common.v1.Faults every fault of a refused document
RpcError    ◀── the same, read back; or a readable account of a call that reached nobody
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from cilia.errors import DomainError, Fault, FaultLike, Kind, Origin
from protos.common.v1 import common_pb2

DETAILS_KEY: Final = "grpc-status-details-bin"  # fixed by the gRPC protocol's rich error model
ERROR_DOMAIN: Final = "cilia"

# The details travel as an HTTP/2 header, and peers refuse header lists above 8 KiB by default.
MAX_DETAILS_BYTES: Final = 4096

CODE_OF_KIND: Final[dict[Kind, grpc.StatusCode]] = {
    Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Kind.CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    Kind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Kind.ABORTED: grpc.StatusCode.ABORTED,
    Kind.DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Kind.OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Kind.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Kind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Kind.CANCELLED: grpc.StatusCode.CANCELLED,
    Kind.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    Kind.INTERNAL: grpc.StatusCode.INTERNAL,
}
KIND_OF_CODE: Final[dict[grpc.StatusCode, Kind]] = {
    **{code: kind for kind, code in CODE_OF_KIND.items()},
    grpc.StatusCode.UNAUTHENTICATED: Kind.DENIED,
    grpc.StatusCode.UNKNOWN: Kind.INTERNAL,
}


class RpcError(DomainError):
    """A call that failed, as its caller sees it.

    `reason` is the name of the remote error (`EndpointNotFound`), "" when no answer of ours came;
    `method` is the called method's full name.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Kind,
        method: str,
        reason: str = "",
        cure: str = "",
        faults: tuple[Fault, ...] = (),
    ) -> None:
        super().__init__(message, kind=kind, cure=cure, faults=faults)
        self.method = method
        self._reason = reason

    @property
    def reason(self) -> str:
        return self._reason


def to_status(error: DomainError) -> status_pb2.Status:
    """The error as a google.rpc.Status.

    When all faults do not fit into a header, the first ones do, and the message says how many there
    are.
    """
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    if error.cure:
        info.metadata["cure"] = error.cure
    status = status_pb2.Status(
        code=CODE_OF_KIND[error.kind].value[0], message=clip(error.message, MAX_DETAILS_BYTES // 4)
    )
    status.details.append(_pack(info))
    if error.faults:
        carried = common_pb2.Faults()
        room = MAX_DETAILS_BYTES - status.ByteSize() - 64
        for fault in error.faults:
            message = fault_to_proto(fault)
            room -= message.ByteSize() + 4
            if room < 0:
                break
            carried.faults.append(message)
        if len(carried.faults) < len(error.faults):
            status.message += (
                f" (the first {len(carried.faults)} of {len(error.faults)} faults are given)"
            )
        status.details.append(_pack(carried))
    return status


def from_status(status: status_pb2.Status, method: str) -> RpcError:
    """Undoes `to_status`; details of other origin are ignored."""
    reason = cure = ""
    faults: tuple[Fault, ...] = ()
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        carried = common_pb2.Faults()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            reason = info.reason
            cure = info.metadata.get("cure", "")
        elif detail.Unpack(carried):
            faults = tuple(fault_from_proto(fault) for fault in carried.faults)
    return RpcError(
        status.message,
        kind=_kind_of_number(status.code),
        method=method,
        reason=reason,
        cure=cure,
        faults=faults,
    )


def fault_to_proto(fault: FaultLike) -> common_pb2.Fault:
    message = common_pb2.Fault(
        document=clip(fault.document), path=clip(fault.path), message=clip(fault.message)
    )
    if fault.origin is not None:
        message.origin.source = fault.origin.source
        message.origin.line = fault.origin.line
        message.origin.column = fault.origin.column
    return message


def fault_from_proto(message: common_pb2.Fault) -> Fault:
    origin = None
    if message.HasField("origin"):
        origin = Origin(message.origin.source, message.origin.line, message.origin.column)
    return Fault(message.document, message.path, message.message, origin)


def clip(text: str, limit: int = 1000) -> str:
    """Bounds a text that came from a document; a cut one ends in an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pack(message: error_details_pb2.ErrorInfo | common_pb2.Faults) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _kind_of_number(number: int) -> Kind:
    for code, kind in KIND_OF_CODE.items():
        if code.value[0] == number:
            return kind
    return Kind.INTERNAL
