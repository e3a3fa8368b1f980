"""Files are written whole or not at all, and damage is named by file and line."""

import os

import pytest

from common.errors import UserError
from common.files import find_input, read_rows, sha256_file, write_atomic, write_json, write_jsonl


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
