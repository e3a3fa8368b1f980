"""Preparing: gates and their switches, the prompt, what is kept, no leak, the same sides and bytes again."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

import prepare_training_data
from common.analysis import DIMENSIONS7, DIMENSIONS8, check_strict, compact_json
from common.data import link_report
from common.data.near_duplicates import group_photos, thumb_of
from common.data.quality import GATES
from common.dataset import load_examples
from common.files import sha256_file
from integration.lora_patch.photo import load_photo
from integration.lora_patch.prompts import DEFAULT_SYSTEM_PROMPT
from integration.lora_patch.repetition import repeated_phrase
from tests.data.test_html_analysis import card, page
from tests.mondrian_case import HTML_PROMPT, SYSTEM_PROMPT, Tree, analysis, picture


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    tree.good(10)
    return tree


def ready(tree: Tree, *options: str):
    result = tree.link()
    assert result.exit_code == 0, result.output
    result = tree.prepare(*options)
    assert result.exit_code == 0, result.output
    return result


def verdicts(tree: Tree) -> dict[str, dict]:
    return {row["job_id"]: row for row in tree.rows("ansel_verdicts")}


def test_dataset_rows(tree: Tree):
    ready(tree)
    rows = tree.rows("ansel_train") + tree.rows("ansel_val")
    assert [len(tree.rows(f"ansel_{side}")) for side in ("train", "val")] == [8, 2]
    row = next(row for row in rows if row["job_id"] == "good-3")
    assert row == {
        "image_path": str(tree.source / "photo-3.jpg"),
        "prompt": f"{SYSTEM_PROMPT}\n\nBe ansel.\n\nAnalyze the provided image.",
        "response": compact_json(analysis(3)),
        "job_id": "good-3",
        "image_sha256": sha256_file(tree.source / "photo-3.jpg"),
    }
    assert all(check_strict(row["response"], DIMENSIONS7) == [] for row in rows)


def test_both_formats_are_read_alike(tree: Tree):
    ready(tree)
    path = tree.folder / "out/training_data_ansel_train.jsonl"
    triplets = load_examples(path)
    ready(tree, "--format", "messages")
    (first, *_) = tree.rows("ansel_train")
    assert list(first) == ["messages", "images", "job_id", "image_sha256"]
    assert load_examples(path) == triplets


def test_meta_names_what_was_written(tree: Tree):
    ready(tree)
    meta, out = tree.meta(), tree.folder / "out"
    assert meta["sha256"] == {
        f"training_data_ansel_{name}": sha256_file(out / f"training_data_ansel_{name}")
        for name in ("train.jsonl", "val.jsonl", "verdicts.jsonl", "split.json", "card.html")
    }
    assert meta["manifest"]["sha256"] == sha256_file(out / "training_data_manifest.jsonl")
    assert (meta["counts"]["linked"], meta["counts"]["train"], meta["counts"]["val"], meta["seed"]) == (10, 8, 2, 42)
    assert meta["gates"]["copied_scores"] == {"level": "warn", "found": 0, "rejected": 0, "job_ids": []}


def test_dry_run_writes_nothing(tree: Tree):
    tree.link()
    before = sorted((tree.folder / "out").iterdir())
    result = tree.prepare("--dry_run")
    assert result.exit_code == 0
    sum_up = "10 linked jobs = 8 training examples (8 photographs) + 2 validation examples (2 photographs) + 0 left out"
    assert sum_up in " ".join(result.output.split())
    assert "Dry run: nothing written" in result.output
    assert sorted((tree.folder / "out").iterdir()) == before


def test_the_same_input_gives_the_same_bytes(tree: Tree):
    ready(tree)
    out = tree.folder / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    ready(tree)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for path in out.glob("*ansel*"):
        path.unlink()
    ready(tree)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# ------------------------------------------------------------------------------------------------ gates


def dimensions(change) -> list[dict]:
    return [change({**dimension}) for dimension in analysis(50)["dimensions"]]


LOOP = "peace and quiet in the valley " * 40
CHINESE = "这张照片展示了一个非常美丽的风景"
GERMAN = "Die Linie führt den Blick sehr gut durch das Bild, und der Himmel ist nicht zu hell für die Berge im Tal."
SALAD = (
    "Layered topography distance atmospheric haze fading ridgelines remain shallowly focused hill crests employ lenses"
)
BAD = {
    "schema": {"image_description": ""},
    "schema 2": {"dimensions": dimensions(lambda d: {k: v for k, v in d.items() if k != "recommendation"})},
    "schema 3": {"overall_score": None},
    "score_range": {"dimensions": dimensions(lambda d: {**d, "score": 0}), "overall_score": 0},
    "whole_scores": {"dimensions": dimensions(lambda d: {**d, "score": d["score"] - 0.5})},
    "language": {"image_description": CHINESE},
    "language 2": {"dimensions": dimensions(lambda d: {**d, "comment": GERMAN, "recommendation": GERMAN + d["name"]})},
    "repetition": {"technical_notes": LOOP},
    "repetition 2": {"technical_notes": "A dune. " + "**peace" * 60},
    "word_salad": {"dimensions": dimensions(lambda d: {**d, "comment": f"{SALAD} {d['name']}.", "recommendation": f"{d['score']} {SALAD}"})},  # noqa: E501
    "comments": {"dimensions": dimensions(lambda d: {**d, "comment": "Good."})},
    "comments 2": {"dimensions": dimensions(lambda d: {**d, "comment": "What works"})},
    "overall": {"overall_score": 9.9},
    "flat_scores": {"dimensions": dimensions(lambda d: {**d, "score": 5}), "overall_score": 5.0},
    "sections": {"technical_notes": ""},
    "length": {"dimensions": dimensions(lambda d: {**d, "comment": " ".join(f"a stone of {i}," for i in range(40))})},
    "boilerplate": {"dimensions": dimensions(lambda d: {**d, "recommendation": "Add elements to the foreground."})},
    "mends": {},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_gate_finds_its_fault(tree: Tree, name: str):
    gate = name.split()[0]
    text = json.dumps(analysis(50, **BAD[name])) + (" Done." if gate == "mends" else "")
    tree.job("bad", tree.photo("bad.jpg", 50), text)
    tree.link()
    for level in ("reject", "warn", "off"):
        options = ("--gate", f"{gate}={level}", "--gate", f"{'sections' if gate != 'sections' else 'length'}=off")
        assert tree.prepare(*options).exit_code == 0
        bad = verdicts(tree)["bad"]
        if level == "reject":
            assert bad["side"] is None and gate in bad["verdicts"]
        assert (gate in bad["verdicts"]) == (level != "off")
        others = [row for job, row in verdicts(tree).items() if job != "bad"]
        assert not any(row["verdicts"] for row in others)
        assert tree.meta()["gates"][gate]["found"] == (level != "off")


def test_defaults_are_as_documented(tree: Tree):
    result = tree.prepare("--help")
    assert all(name in result.output.replace("\n", " ") for name in GATES)
    ready(tree)
    assert {name: gate["level"] for name, gate in tree.meta()["gates"].items()} == {
        name: gate.default for name, gate in GATES.items()
    }
    result = tree.prepare("--gate", "nonsense=warn")
    assert result.exit_code == 1 and result.stderr.startswith("Error: --gate nonsense=warn: write NAME=LEVEL")


def copied(seed: int) -> dict:
    scores = (8, 7, 9, 6, 7, 8, 7)
    listed = [{**d, "score": score} for d, score in zip(analysis(seed)["dimensions"], scores, strict=True)]
    return analysis(seed, dimensions=listed, overall_score=7.4)


def test_copied_scores_come_first(tree: Tree):
    for seed in range(60, 75):
        tree.job(f"copied-{seed}", tree.photo(f"{seed}.jpg", seed), copied(seed), prompt=SYSTEM_PROMPT)
    tree.job(
        "not its own", tree.photo("80.jpg", 80), copied(80), prompt=SYSTEM_PROMPT.replace('"score":8', '"score":3')
    )
    result = ready(tree)
    sentence = "15 of 26 analyses (58%) carry exactly the scores of the example in their own prompt"
    summary = " ".join(result.output[result.output.index("Copied scores") :].split())
    assert summary.startswith(f"Copied scores: {sentence}")
    card_text = (tree.folder / "out/training_data_ansel_card.html").read_text()
    lead = card_text[card_text.index("<main>") :].split("\n")[1:3]
    assert lead[0].startswith('<h1 class="warn">Ready: 21 + 5 photographs, 1 warning')
    assert "Copied scores: 15 of 26" in lead[1]
    assert tree.meta()["copied_scores"]["share"] == round(15 / 26, 4)
    ready(tree, "--gate", "copied_scores=reject")
    assert {job for job, row in verdicts(tree).items() if row["reason"] == "copied_scores"} == {
        f"copied-{seed}" for seed in range(60, 75)
    }


def test_one_analysis_for_several_photographs(tree: Tree):
    for seed in (60, 61):
        tree.job(f"stuck-{seed}", tree.photo(f"{seed}.jpg", seed), analysis(60))
    tree.photo("copy.jpg", 62)
    tree.job("again-1", "copy.jpg", analysis(62))
    tree.job("again-2", "copy.jpg", analysis(62))  # of one photograph: no sign of a stuck model
    ready(tree)
    reasons = {job: row["reason"] for job, row in verdicts(tree).items() if row["reason"]}
    assert reasons == {"stuck-60": "duplicates", "stuck-61": "duplicates", "again-1": "other_kept"}


def test_no_mend(tree: Tree):
    text = json.dumps(analysis(60)).replace("Color Harmony", "color_harmony")
    tree.job("mended", tree.photo("60.jpg", 60), text)
    ready(tree)
    assert tree.meta()["gates"]["mends"]["level"] == "off" and verdicts(tree)["mended"]["side"]
    ready(tree, "--no_mend")
    assert (verdicts(tree)["mended"]["reason"], verdicts(tree)["mended"]["detail"]) == ("mends", "dimension_names")


def test_repetition_lets_ordinary_prose_pass():
    assert repeated_phrase(GERMAN) is None and repeated_phrase(" ".join(str(i) for i in range(200))) is None
    assert repeated_phrase("no " * 50) and repeated_phrase("ab" * 100)


# ------------------------------------------------------------------------------------------------ prompt and response


def eight(seed: int) -> str:
    """A page of the older era with eight dimensions, whose mean is 4.6."""
    cards = (
        card(name, 3 + i % 5, f"Comment {seed} {i} is long enough.", f"Do the thing {seed} {i} now.")
        for i, name in enumerate(DIMENSIONS8)
    )
    return page("".join(cards), grade='<p class="overall-grade"><strong>4.6/10</strong></p>')


def test_eight_dimensions_are_cut_to_the_prompts_seven(tree: Tree):
    tree.job("eight", tree.photo("60.jpg", 60), eight(60))
    ready(tree)
    row = next(r for r in tree.rows("ansel_train") + tree.rows("ansel_val") if r["job_id"] == "eight")
    response = json.loads(row["response"])
    assert [d["name"] for d in response["dimensions"]] == list(DIMENSIONS7)
    assert [d["score"] for d in response["dimensions"]] == [3, 4, 5, 6, 3, 4, 5]
    assert response["overall_score"] == 4.3
    assert (tree.meta()["counts"]["projected"], tree.meta()["counts"]["overall_recomputed"]) == (1, 1)


def test_what_lacks_a_dimension_is_rejected(tree: Tree):
    for seed in (60, 61, 62):
        tree.job(f"eight-{seed}", tree.photo(f"{seed}.jpg", seed), eight(seed))
    ready(tree, "--dimensions", "8")
    assert {job for job, row in verdicts(tree).items() if row["side"]} == {"eight-60", "eight-61", "eight-62"}
    assert verdicts(tree)["good-0"]["detail"] == "lacks the dimension Subject Isolation"


def test_an_html_prompt_gives_way_to_the_built_in_one(tmp_path: Path):
    tree = Tree(tmp_path, system_prompt=HTML_PROMPT)
    tree.good(4)
    result = ready(tree)
    assert "demands HTML: the project's own JSON system prompt takes its place" in " ".join(result.stderr.split())
    assert "--system_prompt FILE or --prompts_db OTHER.db" in " ".join(result.stderr.split())
    assert tree.rows("ansel_train")[0]["prompt"].startswith(DEFAULT_SYSTEM_PROMPT)
    own = tmp_path / "own.txt"
    own.write_text("Be <AdvisorName>.")
    ready(tree, "--system_prompt", str(own))
    assert tree.rows("ansel_train")[0]["prompt"] == "Be ansel.\n\nBe ansel.\n\nAnalyze the provided image."
    other = Tree(tmp_path / "other")
    ready(tree, "--prompts_db", str(other.folder / "mondrian.db"))
    assert tree.rows("ansel_train")[0]["prompt"].startswith(SYSTEM_PROMPT)


def test_a_system_prompt_stored_as_a_blob(tree: Tree):
    tree.connection.execute("UPDATE config SET value = ?", (SYSTEM_PROMPT.encode(),))
    tree.connection.commit()
    ready(tree)
    assert tree.rows("ansel_train")[0]["prompt"].startswith(SYSTEM_PROMPT)


# ------------------------------------------------------------------------------------------------ photographs


def reencoded(tree: Tree, source: str, name: str, **options) -> str:
    with Image.open(tree.source / source) as image:
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(tree.source / name, quality=60, **options)
    return name


def photo_groups(tree: Tree) -> list[set[str]]:
    """Group the photographs of both sides anew, without the program's record."""
    rows = [(side, row) for side in ("train", "val") for row in tree.rows(f"ansel_{side}")]
    thumbs = {f"{side} {row['image_path']}": thumb_of(load_photo(row["image_path"], 256)) for side, row in rows}
    return [{name.split()[0] for name in group} for group in group_photos(thumbs)]


@pytest.mark.parametrize("keep", ["newest", "all"])
def test_copies_fall_on_one_side(tree: Tree, keep: str):
    for seed in range(10):
        data = (tree.source / f"photo-{seed}.jpg").read_bytes()
        (tree.source / f"same-{seed}.jpg").write_bytes(data)
        tree.job(f"same-{seed}", f"same-{seed}.jpg", analysis(seed + 100))
        tree.job(f"small-{seed}", reencoded(tree, f"photo-{seed}.jpg", f"small-{seed}.jpg"), analysis(seed + 200))
    ready(tree, "--keep", keep)
    assert all(len(sides) == 1 for sides in photo_groups(tree))
    counts = [len(tree.rows(f"ansel_{side}")) for side in ("train", "val")]
    assert counts == ([24, 6] if keep == "all" else [8, 2])


def test_the_newest_that_passes_all_gates_is_kept(tree: Tree):
    tree.job("newer", "photo-0.jpg", analysis(60), created_at="2026-02-01T10:00:00.5")
    tree.job(
        "newest, with a warning", "photo-0.jpg", analysis(61, technical_notes=""), created_at="2026-02-02 10:00:00"
    )
    tree.job("newest, rejected", "photo-0.jpg", analysis(62, overall_score=1.0), created_at="2026-02-03 10:00:00")
    ready(tree)
    rows = verdicts(tree)
    assert rows["newer"]["side"] and rows["newest, rejected"]["reason"] == "overall"
    assert [rows[job]["detail"] for job in ("good-0", "newest, with a warning")] == [
        "job newer is kept for this photograph"
    ] * 2


def sides_of(tree: Tree) -> dict[str, str]:
    return {row["image_path"]: side for side in ("train", "val") for row in tree.rows(f"ansel_{side}")}


def test_photographs_keep_their_side_in_later_rounds(tree: Tree):
    ready(tree)
    before = sides_of(tree)
    for start in (10, 25, 60):
        tree.good(start // 2, start)
        result = ready(tree)
        now = sides_of(tree)
        assert {path: now[path] for path in before} == before
        assert abs(list(now.values()).count("val") - 0.2 * len(now)) <= 1
        assert "split anew" not in result.stderr
        before = now
    held = next(path for path, side in before.items() if side == "val")
    tree.job("a copy", reencoded(tree, Path(held).name, "copy.jpg"), analysis(300))
    ready(tree)
    assert sides_of(tree)[str(tree.source / "copy.jpg")] == "val"


def test_the_record_may_lie_elsewhere(tree: Tree):
    ready(tree)
    before, record = sides_of(tree), tree.folder / "sides.json"
    (tree.folder / "out/training_data_ansel_split.json").rename(record)
    tree.good(10, 20)
    ready(tree, "--split_record", str(record))
    assert {path: sides_of(tree)[path] for path in before} == before
    assert len(json.loads(record.read_text())["photographs"]) == 20


def test_a_photograph_that_is_gone_still_guards_its_side(tree: Tree):
    ready(tree)
    held = next(path for path, side in sides_of(tree).items() if side == "val")
    reencoded(tree, Path(held).name, "again.jpg")
    Path(held).unlink()
    tree.job("again", "again.jpg", analysis(300))
    ready(tree)
    assert sides_of(tree)[str(tree.source / "again.jpg")] == "val"


def test_a_photograph_that_ties_both_sides_is_left_out(tree: Tree):
    one, two = picture(1), picture(2)
    steps = {step: Image.blend(one, two, step / 20) for step in range(21)}
    ready(tree)
    sides = sides_of(tree)
    names = [str(tree.source / f"photo-{seed}.jpg") for seed in (1, 2)]
    record = tree.folder / "out/training_data_ansel_split.json"
    value = json.loads(record.read_text())
    shas = [sha256_file(name) for name in names]
    for sha, side in zip(shas, ("train", "val"), strict=True):
        value["photographs"][sha]["side"] = side
    record.write_text(json.dumps(value))
    for number, step in steps.items():
        step.save(tree.source / f"step-{number}.jpg", quality=95)
        tree.job(f"step-{number}", f"step-{number}.jpg", analysis(400 + number))
    ready(tree)
    now = sides_of(tree)
    assert [now[name] for name in names] == ["train", "val"]
    assert {row["reason"] for job, row in verdicts(tree).items() if job.startswith("step")} == {"ties_sides"}
    assert set(now) == set(sides)


def test_an_interrupt_leaves_whole_files(tree: Tree, monkeypatch: pytest.MonkeyPatch):
    ready(tree)
    out = tree.folder / "out"
    before = {path.name: path.read_bytes() for path in out.glob("training_data_*")}
    tree.good(5, 20)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(link_report.Counts, "add", interrupted)
    tree.job("the last", "nowhere.jpg", analysis(60))
    assert tree.link().exit_code == 130
    assert {path.name: path.read_bytes() for path in out.glob("training_data_*")} == before
    monkeypatch.undo()
    tree.link()
    monkeypatch.setattr(prepare_training_data, "data_card", interrupted)
    assert tree.prepare().exit_code == 130
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp"))
    monkeypatch.undo()
    assert tree.prepare().exit_code == 0
    assert tree.meta()["counts"]["linked"] == 15
    names = [name for name in tree.meta()["sha256"] if sha256_file(out / name) != tree.meta()["sha256"][name]]
    assert names == []


def test_another_seed_splits_anew_and_says_so(tree: Tree):
    ready(tree)
    result = ready(tree, "--seed", "7")
    assert "the earlier split had seed 42 and val_split 0.2: split anew" in " ".join(result.stderr.split())
    assert "split anew" not in ready(tree, "--seed", "7").stderr
    ready(tree, "--seed", "7", "--train_split", "0.5")
    assert tree.meta()["counts"]["val"] == 5


def test_too_few_photographs(tmp_path: Path):
    tree = Tree(tmp_path)
    tree.good(1)
    tree.link()
    result = tree.prepare()
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith("Error: 1 photograph left, and a split needs at least 2")
    tree.good(1, 1)
    ready(tree)
    assert [len(tree.rows(f"ansel_{side}")) for side in ("train", "val")] == [1, 1]


# ------------------------------------------------------------------------------------------------ bad input


def test_damaged_manifests(tree: Tree):
    tree.link()
    path = tree.folder / "out/training_data_manifest.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])
    damaged = [{**row, "image_thumb": "AAAA"}, {**row, "mends": "none"}, {**row, "analysis": {"dimensions": [{}]}}]
    path.write_text("\n".join([lines[0], lines[1][:-1], "[]", '{"job_id": "x"}', *map(json.dumps, damaged)]))
    result = tree.prepare()
    assert result.exit_code == 1
    assert [line.strip().removeprefix("Error: ") for line in result.stderr.splitlines()] == [
        f"{path}:2: not valid JSON (Expecting ',' delimiter); link the data again or mend the row",
        f"{path}:3: a JSON object was expected; link the data again or mend the row",
        f"{path}:4: advisor, image_path, image_sha256, image_thumb, analysis is missing or of the wrong kind; link the "
        "data again or mend the row",
        f"{path}:5: image_thumb is damaged; link the data again or mend the row",
        f"{path}:6: a field is of the wrong kind; link the data again or mend the row",
        f"{path}:7: the analysis has no scored dimensions; link the data again or mend the row",
    ]
    assert not list((tree.folder / "out").glob("*ansel*"))


def test_a_json_array_is_read_too(tree: Tree):
    ready(tree)
    before = (tree.folder / "out/training_data_ansel_train.jsonl").read_bytes()
    path = tree.folder / "out/manifest.json"
    path.write_text(json.dumps(tree.rows("manifest")))
    assert tree.prepare("--manifest", str(path)).exit_code == 0
    assert (tree.folder / "out/training_data_ansel_train.jsonl").read_bytes() == before


def test_photographs_that_changed_since_linking(tree: Tree):
    tree.link()
    (tree.source / "photo-0.jpg").unlink()
    picture(77).save(tree.source / "photo-1.jpg", quality=50)
    assert tree.prepare().exit_code == 0
    assert {job for job, row in verdicts(tree).items() if row["reason"] == "photograph_changed"} == {"good-0", "good-1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--advisor", "okeefe"), "no jobs of 'okeefe'; advisors in it: ansel (10)"),
        (("--train_split", "0.8", "--val_split", "0.3"), "--train_split 0.8 and --val_split 0.3 add up to 1.1"),
        (("--manifest", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--prompts_db", "nowhere.db"), "nowhere.db: no such database"),
        (("--system_prompt", "nowhere.txt"), "nowhere.txt: cannot be read as UTF-8 text"),
    ],
)
def test_what_a_user_can_get_wrong(tree: Tree, options, message):
    tree.link()
    result = tree.prepare(*options)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert message in result.stderr


def test_the_card_shows_photographs_and_escapes_what_it_shows(tree: Tree):
    tree.job("<script>alert(1)</script>", tree.photo("a<b>.jpg", 60), analysis(60, technical_notes=""))
    ready(tree)
    html = (tree.folder / "out/training_data_ansel_card.html").read_text()
    assert "<script" not in html and "a&lt;b&gt;.jpg" in html
    assert html.count("data:image/jpeg;base64,") == 11
    assert "http" not in html.replace("http-equiv", "")


def test_progress_and_tables_fit_the_terminal(tree: Tree):
    tree.job("bad", tree.photo("60.jpg", 60), analysis(60, image_description=CHINESE))
    result = ready(tree)
    after = result.stdout[result.stdout.index("Copied scores") :].splitlines()
    assert max(map(len, (line for line in after if not line.startswith("wrote")))) <= 100


def test_length_is_counted_in_the_pixels_that_training_sees():
    from common.data.lengths import LengthCounter

    counter = LengthCounter("none", 1024)
    assert counter.image((4032, 3024)) == 32 * 24  # 1024 x 768 in squares of 32
    assert counter.image((100, 100)) == 8 * 8  # never under 65,536 pixels
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1000)).save(buffer, "JPEG")
    buffer.seek(0)
    assert counter.image(load_photo(buffer).size) == counter.image((2000, 1000))
