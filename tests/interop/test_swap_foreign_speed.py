"""The script that measures other projects' models, at the sizes of the tests."""

import pytest

from support import foreign_speed


def test_the_table_is_written_between_the_comments(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{foreign_speed.START}\nold\n{foreign_speed.END}\nafter\n")
    foreign_speed.main(["--tiny", "--rounds", "1", "--models", "FuseFormer", "M3Net", "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| model", "| FuseFormer", "| M3Net"]
    assert all(row.count("×") == 2 and row.count("→") == 2 for row in rows[1:])
    assert capsys.readouterr().out.strip() in text


def test_a_page_without_the_comments_is_refused_before_the_measurement(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no comments")
    with pytest.raises(ValueError, match="the page must contain <!-- foreign-speed -->"):
        foreign_speed.main(["--tiny", "--write", str(page)])
    assert page.read_text() == "no comments"


def test_a_model_with_another_result_is_refused(monkeypatch):
    monkeypatch.setattr(foreign_speed, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="FuseFormer: the swapped model's result differs by"):
        foreign_speed.main(["--tiny", "--models", "FuseFormer"])
