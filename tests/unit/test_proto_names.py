"""Names in the protos that every language can have."""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2
from forebay.mlx.v1 import worker_pb2
from forebay.models.v1 import models_pb2

FILES = (inference_pb2, models_pb2, fleet_pb2, worker_pb2)


def _clashes(message: Descriptor) -> list[str]:
    """Returns the fields whose accessor in Java is the one that a string beside them has for its bytes."""
    names = {field.name for field in message.fields}
    found = [
        f"{message.full_name}.{field.name}_bytes"
        for field in message.fields
        if field.type == FieldDescriptor.TYPE_STRING and f"{field.name}_bytes" in names
    ]
    return found + [clash for nested in message.nested_types for clash in _clashes(nested)]


def test_no_field_takes_the_name_of_a_java_accessor() -> None:
    messages = [each for file in FILES for each in file.DESCRIPTOR.message_types_by_name.values()]
    assert len(messages) > 50
    assert [clash for message in messages for clash in _clashes(message)] == []


def test_such_a_clash_is_found() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="clash.proto")
    message = file.message_type.add(name="M")
    for number, (name, kind) in enumerate((("token", "STRING"), ("token_bytes", "BYTES")), start=1):
        message.field.add(name=name, number=number, type=f"TYPE_{kind}", label="LABEL_OPTIONAL")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    assert _clashes(pool.FindMessageTypeByName("M")) == ["M.token_bytes"]
