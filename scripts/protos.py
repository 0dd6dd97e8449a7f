"""Builds everything that comes from protos/: the Python stubs, and the descriptor image that buf lints and compares.

scripts/protos.py generate     write services/honed/v1
scripts/protos.py check        lint, compare with the released contract, prove that the stubs are fresh
scripts/protos.py release      make today's contract the one that later changes must not break
"""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUBS = ROOT / "services" / "honed" / "v1"
RELEASED = PROTOS / "released.binpb"
RULES_IMPORT = "from buf.validate import validate_pb2 as buf_dot_validate_dot_validate__pb2\n"


def validation_schema(directory: Path) -> Path:
    """Writes the descriptor set of buf/validate/validate.proto and its imports, as protovalidate ships them."""
    from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
    from protovalidate._gen.buf.validate import validate_pb

    files = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    path = directory / "validate.binpb"
    path.write_bytes(files.SerializeToString())
    return path


def protoc(*arguments: str) -> None:
    """Runs the pinned protoc over every contract file."""
    with tempfile.TemporaryDirectory() as scratch:
        schema = validation_schema(Path(scratch))
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--descriptor_set_in={schema}",
            f"-I{PROTOS}",
            *arguments,
        ]
        subprocess.run([*command, *sorted(str(p) for p in (PROTOS / "honed/v1").glob("*.proto"))], check=True)


def generate(into: Path) -> None:
    """Writes messages, services and their types into `into`/honed/v1."""
    bin_dir = Path(sys.executable).parent
    protoc(
        f"--python_out={into}", f"--grpc_python_out={into}",
        f"--plugin=protoc-gen-mypy={bin_dir}/protoc-gen-mypy", f"--mypy_out=quiet:{into}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir}/protoc-gen-mypy_grpc", f"--mypy_grpc_out=quiet:{into}",
    )  # fmt: skip
    for path in sorted((into / "honed/v1").glob("*_pb2.py")):
        # A client has only protobuf: the rules' schema comes through a module of ours that does without protovalidate.
        path.write_text(
            path.read_text().replace(RULES_IMPORT, "from honed import _rules as buf_dot_validate_dot_validate__pb2\n")
        )
    for path in sorted((into / "honed/v1").glob("*_pb2*.pyi")):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "buf.validate" not in line))


def image(path: Path) -> None:
    """Writes the descriptor image, comments included, that buf reads."""
    protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={path}")


def check() -> int:
    """Returns 0 if the contract is clean, compatible, and its stubs are fresh."""
    buf = Path(sys.executable).parent / "buf"
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        current = Path(scratch) / "image.binpb"
        image(current)
        failures += subprocess.run([buf, "lint", str(current), "--path", "honed"], cwd=PROTOS).returncode != 0
        failures += (
            subprocess.run(
                [buf, "breaking", str(current), "--against", str(RELEASED), "--path", "honed"], cwd=PROTOS
            ).returncode
            != 0
        )
        generate(Path(scratch))
        fresh = Path(scratch) / "honed/v1"
        names = sorted({p.name for p in fresh.iterdir()} | {p.name for p in STUBS.glob("*_pb2*")})
        stale = [
            n
            for n in names
            if not (fresh / n).exists() or not (STUBS / n).exists() or not filecmp.cmp(fresh / n, STUBS / n, shallow=False)
        ]
    if stale:
        print(f"stale stubs: {', '.join(stale)}; run scripts/protos.py generate", file=sys.stderr)
    return int(failures > 0 or bool(stale))


def main() -> int:
    """Runs one of the three commands."""
    match sys.argv[1:]:
        case ["generate"]:
            STUBS.mkdir(parents=True, exist_ok=True)
            generate(ROOT / "services")
            return 0
        case ["check"]:
            return check()
        case ["release"]:
            image(RELEASED)
            return 0
        case _:
            print(__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
