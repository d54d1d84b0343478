"""The protobuf schema of MLCommons Chakra execution traces, built without generated code.

Field numbers and types: mlcommons/chakra schema/protobuf/et_def.proto (package ChakraProtoMsg).
Fields that are not named here (storage details) are kept by protobuf as unknown fields.
"""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

from simulator.importers.files import optional

NODE_TYPES: dict[str, int] = {
    "INVALID_NODE": 0, "METADATA_NODE": 1, "MEM_LOAD_NODE": 2, "MEM_STORE_NODE": 3, "COMP_NODE": 4,
    "COMM_SEND_NODE": 5, "COMM_RECV_NODE": 6, "COMM_COLL_NODE": 7, "STORAGE_NODE": 8,
    "BATCH_NODE": 9, "CHECKPOINT_NODE": 10,
}  # fmt: skip

COLLECTIVE_TYPES: dict[str, int] = {
    "ALL_REDUCE": 0, "REDUCE": 1, "ALL_GATHER": 2, "GATHER": 3, "SCATTER": 4, "BROADCAST": 5,
    "ALL_TO_ALL": 6, "REDUCE_SCATTER": 7, "REDUCE_SCATTER_BLOCK": 8, "BARRIER": 9,
}  # fmt: skip

#: The scalar types of attribute values in the order of their field numbers: `T_val` is 3 + 2 i,
#: `T_list` 4 + 2 i.
_SCALARS = (
    "double", "float", "int32", "int64", "uint32", "uint64", "sint32", "sint64", "fixed32",
    "fixed64", "sfixed32", "sfixed64", "bool", "string", "bytes",
)  # fmt: skip


@functools.cache
def messages() -> SimpleNamespace:
    """The message classes `Node`, `GlobalMetadata` and `AttributeProto`.

    Raises
    ------
    InputError
        If the package protobuf is not installed (extra `chakra`).
    """
    optional("google.protobuf", "chakra", "reading and writing Chakra traces")
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    descriptor_pool = importlib.import_module("google.protobuf.descriptor_pool")
    message_factory = importlib.import_module("google.protobuf.message_factory")

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="simulator/chakra_et_def.proto", package="ChakraProtoMsg", syntax="proto3"
    )

    def add(message: Any, name: str, number: int, kind: str, repeated: bool = False) -> Any:
        label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL
        item = message.field.add(name=name, number=number, label=label)
        if kind in _SCALARS:
            item.type = getattr(field_type, f"TYPE_{kind.upper()}")
        else:
            item.type = field_type.TYPE_ENUM if kind in enums else field_type.TYPE_MESSAGE
            item.type_name = f".ChakraProtoMsg.{kind}"
        return item

    enums = {"NodeType": NODE_TYPES, "CollectiveCommType": COLLECTIVE_TYPES}
    for name, values in enums.items():
        enum = file.enum_type.add(name=name)
        for key, value in values.items():
            enum.value.add(name=key, number=value)
    for scalar in _SCALARS:
        add(file.message_type.add(name=f"{scalar.capitalize()}List"), "values", 1, scalar, True)
    attribute = file.message_type.add(name="AttributeProto")
    add(attribute, "name", 1, "string")
    add(attribute, "doc_string", 2, "string")
    attribute.oneof_decl.add(name="value")
    for index, scalar in enumerate(_SCALARS):
        add(attribute, f"{scalar}_val", 3 + 2 * index, scalar).oneof_index = 0
        listed = add(attribute, f"{scalar}_list", 4 + 2 * index, f"{scalar.capitalize()}List")
        listed.oneof_index = 0
    metadata = file.message_type.add(name="GlobalMetadata")
    add(metadata, "version", 1, "string")
    add(metadata, "attr", 2, "AttributeProto", True)
    info = file.message_type.add(name="IOInfo")
    for number, name in enumerate(("values", "shapes", "types"), 1):
        add(info, name, number, "string")
    node = file.message_type.add(name="Node")
    add(node, "id", 1, "uint64")
    add(node, "name", 2, "string")
    add(node, "type", 3, "NodeType")
    add(node, "ctrl_deps", 4, "uint64", True)
    add(node, "data_deps", 5, "uint64", True)
    add(node, "start_time_micros", 6, "uint64")
    add(node, "duration_micros", 7, "uint64")
    add(node, "inputs", 8, "IOInfo")
    add(node, "outputs", 9, "IOInfo")
    add(node, "attr", 10, "AttributeProto", True)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return SimpleNamespace(
        **{
            name: message_factory.GetMessageClass(
                pool.FindMessageTypeByName(f"ChakraProtoMsg.{name}")
            )
            for name in ("Node", "GlobalMetadata", "AttributeProto")
        }
    )
