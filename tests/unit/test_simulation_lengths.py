"""Traces, distributions and the built-in lengths."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from megatron_rl.config import UserError
from megatron_rl.simulation.lengths import Pmf, built_in, read, scaled

REASONING = Path(__file__).resolve().parents[3] / "shared" / "data" / "lengths" / "reasoning_pmf.csv.gz"


def file_of(folder: Path, text: str, name: str = "lengths.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_trace_is_counted_scaled_and_clipped(tmp_path: Path) -> None:
    lengths = read(file_of(tmp_path, "when,output_tokens\n1,10\n2,10\n3,30\n4,0\n"))
    assert lengths.all == Pmf((1, 10, 30), (0.25, 0.5, 0.25))
    assert scaled(lengths, 2.5, 60).all == Pmf((2, 25, 60), (0.25, 0.5, 0.25))
    pmf = lengths.all
    assert (pmf.mean, pmf.quantile(0.5), pmf.quantile(0.8), pmf.at_least(10)) == (12.75, 10, 30, 0.75)
    assert pmf.moment(2) == 0.25 + 50 + 225
    assert read(file_of(tmp_path, "when,output_tokens\n1,10\n"), column="when").all == Pmf((1,), (1.0,))


def test_every_client_weighs_the_same_and_so_does_every_window_of_one(tmp_path: Path) -> None:
    text = "client,window_s,output_tokens,prob\na,0,10,5\na,60,20,0.5\na,60,30,0.5\nb,0,40,0.1\n"
    with gzip.open(tmp_path / "pmf.csv.gz", "wt") as file:
        file.write(text)
    lengths = read(tmp_path / "pmf.csv.gz")
    assert lengths.all == Pmf((10, 20, 30, 40), (0.25, 0.125, 0.125, 0.5))
    assert lengths.clients == (Pmf((10, 20, 30), (0.5, 0.25, 0.25)), Pmf((40,), (1.0,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column output_tokens or .*; it has a, b"),
        ("", "it has none"),
        ("tokens\n", "no row"),
        ("tokens\n3\nx\n", r"lengths.csv:3: tokens='x' is no number of 0 or more"),
        ("tokens\n-1\n", "tokens='-1'"),
        ("client,output_tokens,prob\na,3,0\n", "a client without probability"),
        ("client,output_tokens,prob\na,3\n", "prob=None"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(file_of(tmp_path, text))
    assert raised.value.exit_code == 1


def test_a_file_that_is_not_there_or_no_gzip_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.csv: No such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"x.gz: Not a gzipped file"):
        read(file_of(tmp_path, "tokens\n1\n", "x.gz"))


def test_draws_follow_the_shares_and_the_seed() -> None:
    pmf = Pmf.of({1: 1.0, 5: 2.0, 9: 1.0})
    stream = random.Random(3)
    draws = [pmf.draw(stream) for _ in range(8000)]
    assert [draws.count(length) / 8000 for length in pmf.lengths] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert [pmf.draw(random.Random(7)) for _ in range(3)] == [pmf.draw(random.Random(7))] * 3


def test_the_built_in_lengths_are_long_tailed() -> None:
    pmf = scaled(built_in(), 1, 65_536).all
    assert pmf.mean == pytest.approx(12_079, abs=1)
    assert pmf.quantile(0.5) == 7_312
    assert pmf.at_least(65_536) == pytest.approx(0.037, abs=0.001)


@pytest.mark.skipif(not REASONING.exists(), reason="the reasoning lengths are not beside this checkout")
def test_the_built_in_lengths_resemble_real_ones() -> None:
    real, ours = scaled(read(REASONING), 14, 65_536).all, scaled(built_in(), 1, 65_536).all
    assert real.mean == pytest.approx(12_273, abs=1)
    assert ours.mean == pytest.approx(real.mean, rel=0.03)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert ours.quantile(share) == pytest.approx(real.quantile(share), rel=0.1)
