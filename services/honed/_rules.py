"""Puts the schema of the contract's validation rules in reach of the generated stubs.

The rules are protobuf options of `buf/validate/validate.proto`. The stubs only need a file of that name in the descriptor pool:
the rules' bytes travel inside our own descriptors, where protovalidate reads them on the server. So a client does without it.
"""

from google.protobuf import descriptor_pb2, descriptor_pool

try:
    descriptor_pool.Default().FindFileByName("buf/validate/validate.proto")
except KeyError:
    descriptor_pool.Default().AddSerializedFile(
        descriptor_pb2.FileDescriptorProto(
            name="buf/validate/validate.proto", package="buf.validate", syntax="proto2"
        ).SerializeToString()
    )
