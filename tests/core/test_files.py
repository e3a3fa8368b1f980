"""Files are written whole or not at all, and damage is named by file and line."""

import os
import subprocess
import sys
import tracemalloc

import pytest

from common.errors import UserError
from common.files import RowFile, find_input, read_json, read_rows, sha256_file, write_atomic, write_json, write_jsonl
from common.schemas import Column


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"era": "old"})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), write_atomic(path) as file:
        file.write("half of ")
        raise RuntimeError
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_that_refuses_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/report\.json: cannot be written"):
        write_json(tmp_path / "file" / "report.json", {})


def test_rows_keep_their_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ({"comment": text} for text in ("light", "line\u2028separator", "Größe")))
    assert read_rows(path) == [
        (1, {"comment": "light"}),
        (2, {"comment": "line\u2028separator"}),
        (3, {"comment": "Größe"}),
    ]
    path.write_text('\ufeff{"a": 1}\r\n\r\n{"b": 2}\r\n')
    assert read_rows(path) == [(1, {"a": 1}), (3, {"b": 2})]


def test_a_json_array_is_read_too(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n[{"a": 1},\n {"b": 2}]')
    assert read_rows(path) == [(1, {"a": 1}), (2, {"b": 2})]


def test_every_damaged_row_is_named_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": \n[1]\n{"c": 3}\n')
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert f"{path}:2: not valid JSON" in error.value.message
    assert f"{path}:3: a JSON object was expected" in error.value.message


def line(text: str) -> str:
    return '{"a": ' + text + "}"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (line("NaN"), "not valid JSON (NaN is no JSON number)"),
        (line("9" * 5000), "not valid JSON (Exceeds the limit"),
        (line("[" * 200 + "]" * 200), "not valid JSON (nested too deeply)"),
        (line("[" * 100_000 + "]" * 100_000), "not valid JSON (nested too deeply)"),
        (line('"\\ud800"'), "holds half a character"),
        ("[1, 2]", "a JSON object was expected"),
        (line('"' + "x" * 8_000_000 + '"'), "a line of more than 8,000,000 bytes"),
    ],
    ids=["nan", "digits", "nested", "nested without end", "surrogate", "array", "long"],
)
def test_a_row_that_cannot_be_is_one_line(tmp_path, row, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{row}\n{{"b": 2}}\n')
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert error.value.message.startswith(f"{path}:2: {says}") and "\n" not in error.value.message
    path.write_text(row)
    if says.startswith(("not valid", "holds")):
        with pytest.raises(UserError, match=r"rows\.jsonl"):
            read_json(path)


def test_a_row_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not UTF-8 text \(byte 7\)"):
        read_rows(path)


def test_a_long_line_is_passed_over_in_little_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        for _ in range(50):
            file.write(b'{"a": "' if file.tell() == 0 else b"x" * 1_000_000)
        file.write(b'"}\n{"b": 2}\n')
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"rows\.jsonl:1: a line of more than"):
            read_rows(path)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_rows_are_read_again_by_their_place(tmp_path):
    for name, text in (("rows.jsonl", '{"a": 1}\n\n{"a": 2}\n{"a": 3}\n'), ("rows.json", '[{"a":1},{"a":2},{"a":3}]')):
        (tmp_path / name).write_text(text)
        file = RowFile(tmp_path / name, {"a": Column("count", "any")})
        places = [place for _, place, _ in file.rows()]
        assert list(file.read(places[::-1])) == [{"a": 3}, {"a": 2}, {"a": 1}]
        with pytest.raises(UserError, match="a is 1; a text was expected"):
            list(RowFile(tmp_path / name, {"a": Column("text", "any")}).rows())


def test_what_a_killed_run_left_is_swept_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "report.json"
    (tmp_path / ".report.json.abc123.tmp").write_text("left")
    (tmp_path / ".other.json.abc123.tmp").write_text("another file's")
    with write_atomic(path) as file:
        file.write("{}")
        file.flush()
        (living,) = tmp_path.glob(".report.json.*.tmp")
        code = f"from common.files import write_json; write_json({str(path)!r}, 5)"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert living.exists() and path.read_text() == "5\n"
    assert path.read_text() == "{}"
    assert sorted(os.listdir(tmp_path)) == [".other.json.abc123.tmp", "report.json"]


def test_documented_names_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl("training_data/training_data_ansel_train.jsonl", [{"a": 1}])
    assert str(find_input("training_data_ansel_train.json")) == "training_data/training_data_ansel_train.jsonl"
    assert "training_data_ansel_train.json is not there; reading training_data/" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"nothing\.json: no such file .*training_data/nothing\.jsonl"):
        find_input("nothing.json")


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
