"""Training rows are read in both documented forms, with every damaged row named."""

import pytest
from PIL import Image

from common.dataset import load_examples, messages_row, read_meta, triplet_row
from common.errors import UserError
from common.files import sha256_file, write_json, write_jsonl

ROW = {"prompt": "Judge.", "response": '{"overall_score":7}', "job_id": "job-1", "image_sha256": "ab" * 32}


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "source").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "source" / "a.png")
    return "source/a.png"


def test_both_forms_give_the_same_example(tmp_path, photo):
    path = tmp_path / "training_data" / "data.jsonl"
    write_jsonl(path, [triplet_row(photo, **ROW), messages_row(photo, **ROW)])
    first, second = load_examples(path)
    assert first.image_paths[0].samefile(tmp_path / photo)
    assert (first.prompt, first.response, first.sha256, first.job_id) == (
        "Judge.",
        ROW["response"],
        ("ab" * 32,),
        "job-1",
    )
    assert first.source == f"{path}:1"
    assert second.__dict__ | {"source": ""} == first.__dict__ | {"source": ""}


def test_llama_factorys_plain_text_messages(tmp_path, photo):
    path = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "<image>\nJudge."}, {"role": "assistant", "content": "{}"}]
    write_jsonl(path, [{"messages": messages, "images": [photo]}])
    (example,) = load_examples(path)
    assert (example.prompt, example.response, example.job_id) == ("Judge.", "{}", "line-1")


def test_all_damage_is_named_at_once(tmp_path, photo):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{**ROW, "image_path": "gone.jpg"}, {**ROW, "image_path": photo, "response": ""},
                       {**ROW, "image_path": photo}, {"messages": [{"role": "user"}], "images": [photo]}])  # fmt: skip
    with pytest.raises(UserError) as error:
        load_examples(path)
    lines = error.value.message.splitlines()
    assert len(lines) == 3
    assert f"{path}:1: photograph gone.jpg is not there" in lines[0]
    assert f'{path}:2: response is ""; a text that is not empty was expected' in lines[1]
    assert f"{path}:4: 'messages' must be" in lines[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_sha256": 5}, "image_sha256 is 5; 64 hex digits, or several such was expected"),
        ({"image_path": "x" * 5000}, 'image_path is "xxx'),
        ({"image_path": ["a\0.png"]}, "image_path is a list; a path or several was expected"),
        ({"prompt": ["Judge."]}, "prompt is a list; a text that is not empty was expected"),
        ({"image_path": "x" * 300}, "photograph xxx"),
        ({"masked_spans": [[3, 1]]}, "masked_spans is a list; a list of [start, end], sorted was expected"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path, photo, change, says):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{**ROW, "image_path": photo}, {**ROW, "image_path": photo} | change])
    with pytest.raises(UserError) as error:
        load_examples(path)
    assert error.value.message.startswith(f"{path}:2: {says}")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(UserError, match="no examples in it"):
        load_examples(tmp_path / "data.jsonl")


def test_masked_spans_travel_in_both_forms(tmp_path, photo):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [make(photo, **ROW, masked_spans=[(17, 18)]) for make in (triplet_row, messages_row)])
    assert [example.masked_spans for example in load_examples(path)] == [((17, 18),)] * 2
    for wrong in ([[17, 30]], [[2, 1]], [[1]], [1, 2], "all", [[True, 2]], [[3, 4], [1, 2]]):
        write_jsonl(path, [{**triplet_row(photo, **ROW), "masked_spans": wrong}])
        with pytest.raises(UserError, match="data.jsonl:1: .*masked_spans"):
            load_examples(path)


def test_a_set_is_taken_whole_or_not_at_all(tmp_path):
    train, val, meta = (tmp_path / f"training_data_ansel_{name}" for name in ("train.jsonl", "val.jsonl", "meta.json"))
    train.write_text("{}")
    val.write_text("[]")
    assert read_meta(train, val) is None
    write_json(meta, {"advisor": "ansel", "sha256": {path.name: sha256_file(path) for path in (train, val)}})
    assert read_meta(train, val)["advisor"] == "ansel"
    val.write_text("[1]")
    with pytest.raises(UserError, match="val.jsonl: not the file that training_data_ansel_meta.json was written with"):
        read_meta(train, val)


def messages(user: object, **row: object) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "{}"}], **row}


def test_marks_of_several_photographs_are_not_text_and_image_path_is_read(tmp_path, photo):
    path = tmp_path / "data.jsonl"
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Judge."}]
    rows = [messages("<image>\n<image>\nJudge.", images=[photo, photo]), messages(parts, images=[photo, photo]),
            messages("Judge.", image_path=photo)]  # fmt: skip
    write_jsonl(path, rows)
    examples = load_examples(path)
    assert [example.prompt for example in examples] == ["Judge."] * 3
    assert [len(example.image_paths) for example in examples] == [2, 2, 1]


MENDED = {
    "after text": (messages("Judge <image> this.", images=["a"]), "a photograph after text"),
    "parts after text": (
        messages([{"type": "text", "text": "Judge"}, {"type": "image"}], images=["a"]),
        "a photograph after text",
    ),
    "two marks for one": (messages("<image><image>Judge.", images=["a"]), "2 image marks for 1 photographs"),
    "a video": (messages([{"type": "video"}], images=["a"]), "neither text nor image"),
    "blank response": ({"image_path": "a", **ROW, "response": " \n\t"}, "response is "),
    "blank prompt": (messages("<image> \n", images=["a"]), "a message has no text"),
    "no photograph": (messages("Judge.", images=[]), "images"),
}


@pytest.mark.parametrize("name", MENDED)
def test_rows_that_would_be_trained_otherwise_than_they_read_are_refused(name, tmp_path):
    row, message = MENDED[name]
    write_jsonl(tmp_path / "data.jsonl", [row])
    with pytest.raises(UserError, match=f"data.jsonl:1: .*{message}"):
        load_examples(tmp_path / "data.jsonl")
