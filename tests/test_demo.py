"""The demo from end to end on a small model, but for the benchmark, whose figures are given."""

import json
import re
from pathlib import Path

import pytest

import benchmarks.cli
from model import cli, demo
from model.config import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = json.loads(
    (Path(__file__).parent.parent / "benchmarks/results/avx2-train-shakespeare-cpu.json").read_text(encoding="utf-8")
)


def test_it_ends_with_a_page_of_everything(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the <question>.\n" * 40)
    small = [f"data={text}", "name=a", "threads=1"]
    monkeypatch.setattr(demo, "resolve", lambda preset, overrides: resolve("tiny", [*overrides, *small]))

    def bench(argv):
        Path(argv[argv.index("--out") + 1]).write_text(json.dumps(CASE))
        return 0

    monkeypatch.setattr(benchmarks.cli, "main", bench)
    status = cli.main(["demo", "--steps", "40", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    report = Path(re.search(r"on one page: (.*)", out.splitlines()[-1])[1])
    page = report.read_text(encoding="utf-8")
    assert status == 0 and report == (tmp_path / "a" / "report.html").resolve() and "check passed, bench ran" in out
    assert page.count("<figure>") == 6 and page.count("<svg") == 6
    ours = CASE["cases"][0]["columns"]["ours"]["step"]["ms"]
    assert f"{ours:.1f} ms" in page and "times as fast as torch.compile" in page
    assert "The fast model computes the reference" in page and "Is it equal?" in page
    loss = re.search(r"validation loss (\d\.\d{4}) after 40 steps", out)[1]
    assert f"{loss} on the whole validation part" in page and "<question>" not in page
