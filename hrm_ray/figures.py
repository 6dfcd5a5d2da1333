"""How figures look."""

from typing import Any

COLOURS = ("#2f78b7", "#e08a1e", "#2a9d5c", "#9b4fa5", "#c9302c", "#7f6a4f", "#1f9aa8", "#555555")
INK, GRID = "#222222", "#dddddd"
DPI = 130
STYLE: Any = {  # of matplotlib
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a "$" in a value is no formula
}
