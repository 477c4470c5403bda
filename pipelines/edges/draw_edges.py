"""Draw the edges of photographs in grey, as another sensor might see the same scenes: PHOTOS EDGES.

Stands for depth or infrared images; a file is named as its photograph, with another ending.
"""

import sys
from pathlib import Path

from PIL import Image, ImageFilter

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def draw_edges(photos: Path, edges: Path) -> None:
    """Write one PNG file for each photograph, in the same folders."""
    for photo in sorted(path for path in photos.rglob("*") if path.suffix.lower() in ENDINGS):
        file = edges / photo.relative_to(photos).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo).convert("L").filter(ImageFilter.FIND_EDGES).save(file)


if __name__ == "__main__":
    draw_edges(Path(sys.argv[1]), Path(sys.argv[2]))
