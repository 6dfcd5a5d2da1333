"""Reading files that somebody else wrote: regular, whole, of a reasonable size, or one line that says what they are."""

from pathlib import Path

from hrm_ray.errors import UserError, first_line

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_regular(file: Path) -> None:
    """Raise UserError if `file` is missing, no regular file (reading a pipe would never end), empty, or a pointer."""
    try:
        if not file.exists():
            raise UserError(f"{file} is missing")
        if not file.is_file():
            raise UserError(f"{file} is {'a folder' if file.is_dir() else 'a device or pipe'}, not a file")
        with file.open("rb") as content:
            start = content.read(len(LFS_POINTER))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not start:
        raise UserError(f"{file} is empty; copy or download it again")
    if start == LFS_POINTER:
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository"
        )


def read_bytes(file: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes. Raises UserError as `check_regular` does, or if it is larger."""
    check_regular(file)
    try:
        with file.open("rb") as content:
            data = content.read(most + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or first_line(error)}") from None
    if len(data) > most:
        raise UserError(f"{file} is larger than {most // 1_000_000} MB: not a file of the published layout")
    return data
