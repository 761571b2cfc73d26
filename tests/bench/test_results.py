# SPDX-License-Identifier: Apache-2.0
"""The page of results is what the rows give: under their commands, and only of rows that say how they were made."""

import json

import pytest

from pyro_sm.__main__ import main
from pyro_sm.bench.commands import results
from pyro_sm.bench.rows import PROVENANCE
from pyro_sm.bench.table import Table

MADE = {"date": "2026-11-28", "revision": "abc", "machine": "an abacus"}
COMMAND = "python -m pyro_sm bench many-latents"


def row(groups, way, seed, error, command="", **more):
    return {
        "groups": groups, "way": way, "seed": seed, "budget": 1000, "latents": groups + 3, "log Z error": error,
        "log Z se": 0.02, "khat": 0.1 + 0.2 * seed, "ESS": 0.5, "evaluations": 900, "rounds": 0, "CPU s": 3.0, **MADE,
        "command": f"{COMMAND}{command} --out /somewhere/rows.jsonl", **more,
    }  # fmt: skip


ROWS = [
    row(7, "base", 0, 0.1),
    row(7, "sampler", 0, -0.01),
    row(7, "base", 1, -0.3, " --seeds 1", date="2026-11-30"),
    row(7, "sampler", 1, 0.03, " --seeds 1", date="2026-11-29"),
    row(9, "base", 0, 0.2, machine="a slide rule"),
]
PAGE = f"""\
{results._HEAD}

## Hundreds of latents: centred group effects, as in the radon data, with an evidence that is known

Columns: latents and way: `base` are the weights of `BatchAndMatchBase` as it is; `sampler` is
`DiffusionSampler` from it. Error of log Z (nats) with its own standard error; effective share and k̂ of 10,000
draws; evaluations before them; CPU seconds.

### at most 1,000 evaluations

* `{COMMAND}`: 2026-11-28; revision abc; an abacus
* `{COMMAND} --seeds 1`: 2026-11-29, 2026-11-30; revision abc; an abacus
* `{COMMAND}`: 2026-11-28; revision abc; a slide rule

| latents: way | log Z error ± se | ESS | k̂ | evaluations | CPU s |
|---|---|---|---|---|---|
| 10: base | -0.100; -0.300 ± 0.020 | 0.50; 0.50 | 0.20; 0.30 | 900 | 3 |
| 10: sampler | +0.010; +0.030 ± 0.020 | 0.50; 0.50 | 0.20; 0.30 | 900 | 3 |
| 12: base | +0.200 ± 0.020 | 0.50 | 0.10 | 900 | 3 |
"""


def written(folder, rows, name="many-latents.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    return ["bench", "results", "--rows", str(folder), "--to", str(folder / "RESULTS.md")]


def test_the_page_is_exact_and_the_check_sees_when_it_is_not(tmp_path, capsys):
    command = written(tmp_path, ROWS[:2])
    written(tmp_path, ROWS[2:], "many-latents-more.jsonl")
    page = tmp_path / "RESULTS.md"
    assert main([*command, "--check"]) == 1
    assert not page.exists()
    assert main(command) == 0
    assert page.read_text() == PAGE
    assert main([*command, "--check"]) == 0
    page.write_text(PAGE.replace("+0.200", "+0.000"))
    capsys.readouterr()
    assert main([*command, "--check"]) == 1
    assert "is not what the rows give: run `python -m pyro_sm bench results`" in capsys.readouterr().err
    assert "+0.000" in page.read_text()


def test_our_own_page_is_what_our_rows_give():
    assert main(["bench", "results", "--check"]) == 0


@pytest.mark.parametrize("lost", PROVENANCE)
def test_a_row_that_does_not_say_how_it_was_made_is_refused(tmp_path, capsys, lost):
    without = {key: value for key, value in ROWS[1].items() if key != lost}
    assert main(written(tmp_path, [ROWS[0], without])) == 1
    assert f"line 2 of 'many-latents.jsonl' lacks {lost}: a row says how it was made" in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()


def test_files_of_no_command_and_rows_twice_are_refused(tmp_path, capsys):
    written(tmp_path / "a", ROWS)
    assert main(written(tmp_path / "a", [ROWS[4]], "many-latents-again.jsonl")) == 1
    assert (
        "line 1 of 'many-latents-again.jsonl' is of the same run as line 5 of 'many-latents.jsonl'"
        in capsys.readouterr().err
    )
    assert main(written(tmp_path / "b", ROWS, "latents.jsonl")) == 1
    assert "'latents.jsonl' is of no command with tables: expected one of posteriors" in capsys.readouterr().err
    assert main(["bench", "results", "--rows", str(tmp_path / "c")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_without_rows_the_page_says_so(tmp_path):
    assert main(written(tmp_path, [])) == 0
    assert (tmp_path / "RESULTS.md").read_text() == f"{results._HEAD}\n\nThere are no rows yet.\n"


@pytest.mark.parametrize("section", results.SECTIONS, ids=lambda section: section.name)
def test_every_command_says_what_its_columns_are(section):
    text = results.columns_of(section.explained)
    assert text.startswith("Columns: ")
    assert "``" not in text
    assert ":mod:" not in text
    assert section.keys


def test_a_section_is_a_function_from_rows_to_tables(tmp_path):
    """What a later one has to add."""
    section = results.Section("sums", "Sums.\n\nColumns: ``one``.", ("x",), lambda rows: [Table("", "one", rows)])
    written(tmp_path, [{"x": 1, **MADE, "command": "abacus --out=here --fast"}], "sums-of-today.jsonl")
    page = results.page(results.read_folder(tmp_path, [section]), [section])
    assert page.endswith(
        "## Sums\n\nColumns: `one`.\n\n* `abacus --fast`: 2026-11-28; revision abc; an abacus\n\none\n"
    )


def test_columns_that_are_not_explained_are_an_error():
    with pytest.raises(ValueError, match="a paragraph that begins with 'Columns: '"):
        results.columns_of("Sums.")
