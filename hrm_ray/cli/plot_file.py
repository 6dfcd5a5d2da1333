"""Files that plots are written to."""

from pathlib import Path

KINDS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}  # and how they begin


def is_plot(file: Path) -> bool:
    """Whether an ordinary file is a plot of the kind that its name says."""
    begins = KINDS[file.suffix]
    with file.open("rb") as opened:
        return opened.read(len(begins)) == begins


def check_kind(out: str) -> None:
    """Raise ValueError unless the name ends as that of a plot."""
    if Path(out).suffix not in KINDS:
        raise ValueError(f"out={out}: end the name of the plot in one of {', '.join(KINDS)}")
