"""Images of every kind, and what may befall their bytes on the way."""

from __future__ import annotations

import random

KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "JPEG2000")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, put in, cut out or doubled in up to eight places, most of them in the first hundred."""
    changed = bytearray(data)
    for _ in range(chance.randint(0, chance.choice((1, 3, 8)))):
        end = min(len(changed), 100) if chance.random() < 0.6 else len(changed)
        place = chance.randrange(max(end, 1))
        match chance.randrange(5):
            case 0:
                changed[place : place + 1] = chance.randbytes(1)
            case 1:
                changed[place:place] = chance.randbytes(chance.randint(1, 16))
            case 2:
                del changed[place : place + chance.randint(1, 40)]
            case 3:
                changed[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
            case _:
                changed = changed[:place] if chance.random() < 0.3 else changed + changed[place : place + 1000]
    return bytes(changed)
