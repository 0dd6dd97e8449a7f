"""The header of a safetensors file: which tensors it holds, checked against the file's size, without loading any.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from honed.artifacts.manifest import TensorEntry
from honed.kit.errors import DataLoss

_HEADER_MAX_BYTES = 100 << 20
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


def read_tensor_entries(path: Path, name: str) -> list[TensorEntry]:
    """The tensors of the safetensors file at `path`, in the order of their data.

    Args:
        path: The file.
        name: What to call it in the entries and in errors: its path inside the version.

    Raises:
        DataLoss: If the header is damaged, or the data is shorter or longer than the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_MAX_BYTES):
            raise DataLoss(f"{name}: the safetensors header is truncated (file of {size} bytes)")
        try:
            header = json.loads(file.read(length))
            spans = sorted(
                (int(value["data_offsets"][0]), int(value["data_offsets"][1]), key, str(value["dtype"]),
                 tuple(int(n) for n in value["shape"]))
                for key, value in header.items() if key != "__metadata__"
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise DataLoss(f"{name}: the safetensors header is damaged: {error!r}") from error
    end_of_data = 0
    for start, end, tensor, dtype, shape in spans:
        bits = _DTYPE_BITS.get(dtype)
        if bits is None:
            raise DataLoss(f"{name}: tensor {tensor!r} has the unknown dtype {dtype!r}")
        if start != end_of_data or end - start != math.prod(shape) * bits // 8:
            raise DataLoss(f"{name}: tensor {tensor!r} does not fill its place in the data")
        end_of_data = end
    if 8 + length + end_of_data != size:
        raise DataLoss(f"{name}: {size} bytes, but the header describes {8 + length + end_of_data}")
    return [TensorEntry(tensor, dtype, shape, name) for _, _, tensor, dtype, shape in spans]
