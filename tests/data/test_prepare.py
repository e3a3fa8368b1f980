"""Preparing: gates and their switches, the prompt, what is kept, no leak, the same sides and bytes again."""

import contextlib
import io
import itertools
import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_training_data
from common.data import link_report
from common.data.near_duplicates import group_photos, thumb_of
from common.data.quality import GATES, word_salad
from common.dataset import load_examples, read_meta
from common.errors import UserError
from common.files import sha256_file
from integration.lora_patch.photo import load_photo
from integration.lora_patch.prompts import DEFAULT_SYSTEM_PROMPT, read_specification
from integration.lora_patch.repetition import repeated_phrase
from integration.lora_patch.specification import DIMENSIONS7, DIMENSIONS8
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
        "response": read_specification(SYSTEM_PROMPT).render(analysis(3)),
        "job_id": "good-3",
        "image_sha256": sha256_file(tree.source / "photo-3.jpg"),
        "masked_spans": [],
    }
    assert all(read_specification(row["prompt"]).check(row["response"]) == [] for row in rows)


def test_both_formats_are_read_alike(tree: Tree):
    ready(tree)
    path = tree.folder / "out/training_data_ansel_train.jsonl"
    triplets = load_examples(path)
    ready(tree, "--format", "messages")
    (first, *_) = tree.rows("ansel_train")
    assert list(first) == ["messages", "images", "job_id", "image_sha256", "masked_spans"]
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
    assert meta["gates"]["copied_scores"] == {"level": "mask", "found": 0, "rejected": 0, "job_ids": []}


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
    "overall 2": {"overall_score": None},
    "flat_scores": {"dimensions": dimensions(lambda d: {**d, "score": 5}), "overall_score": 5.0},
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
        assert tree.prepare("--gate", f"{gate}={level}").exit_code == 0
        bad = verdicts(tree)["bad"]
        if level == "reject":
            assert bad["side"] is None and gate in bad["verdicts"]
        assert (gate in bad["verdicts"]) == (level != "off")
        others = [row for job, row in verdicts(tree).items() if job != "bad"]
        assert not any(row["verdicts"] for row in others)
        assert tree.meta()["gates"][gate]["found"] == (level != "off")


def test_what_a_gate_finds_in_most_analyses_is_a_warning(tree: Tree):
    for seed in range(60, 80):
        bad = analysis(seed, **BAD["boilerplate"])
        tree.job(f"same-{seed}", tree.photo(f"{seed}.jpg", seed), bad)
    tree.link()
    assert tree.prepare().exit_code == 0
    meta = tree.meta()
    linked = meta["counts"]["linked"]
    assert meta["gates"]["boilerplate"]["found"] == 20 > linked / 2
    told = f"gate boilerplate: 20 of {linked} analyses, comments that it shares with other dimensions"
    assert any(warning.startswith(told) for warning in meta["warnings"])


def test_defaults_are_as_documented(tree: Tree):
    result = tree.prepare("--help")
    assert all(name in result.output.replace("\n", " ") for name in GATES)
    ready(tree)
    assert {name: gate["level"] for name, gate in tree.meta()["gates"].items()} == {
        name: gate.default for name, gate in GATES.items()
    }
    result = tree.prepare("--gate", "nonsense=warn")
    assert result.exit_code == 1 and result.stderr.startswith("Error: --gate nonsense=warn: write NAME=LEVEL")


EXAMPLE = (8, 7, 9, 6, 7, 8, 7)  # the scores in SYSTEM_PROMPT


def scored(seed: int, scores: tuple[int, ...] = EXAMPLE, overall: float = 7.4) -> dict:
    listed = [{**d, "score": score} for d, score in zip(analysis(seed)["dimensions"], scores, strict=True)]
    return analysis(seed, dimensions=listed, overall_score=overall)


def masked(row: dict) -> list[str]:
    return [row["response"][start:end] for start, end in row["masked_spans"]]


def add_copies(tree: Tree) -> None:
    for seed in range(60, 72):
        tree.job(f"exact-{seed}", tree.photo(f"{seed}.jpg", seed), scored(seed), prompt=SYSTEM_PROMPT)
    for seed in range(72, 75):
        near = scored(seed, (8, 7, 9, 6, 7, 8, 4), 7.0)
        tree.job(f"near-{seed}", tree.photo(f"{seed}.jpg", seed), near, prompt=SYSTEM_PROMPT)
    other = SYSTEM_PROMPT.replace('"score":8', '"score":3')
    tree.job("not its own", tree.photo("80.jpg", 80), scored(80), prompt=other)


def test_copied_scores_are_kept_for_their_comments(tree: Tree):
    add_copies(tree)
    result = ready(tree)
    sentence = (
        "Left to learn: comments of 26 photographs, scores of 11. 15 of 26 analyses (58%) carry the scores of the "
        "example in their own prompt, 3 of them but for one: their scores stay out of the loss."
    )
    summary = " ".join(result.output[result.output.index("Left to learn") :].split())
    assert summary.startswith(sentence)
    card_text = (tree.folder / "out/training_data_ansel_card.html").read_text()
    lead = card_text[card_text.index("<main>") :].split("\n")[1:3]
    assert lead[0].startswith('<h1 class="warn">Ready: 21 + 5 photographs, 1 warning') and sentence in lead[1]
    learn = tree.meta()["left_to_learn"]
    assert {key: learn[key] for key in learn if key != "text"} == {
        "comments": 26,
        "scores": 11,
        "copied": 15,
        "near": 3,
        "of": 26,
    }
    rows = {row["job_id"]: row for row in tree.rows("ansel_train") + tree.rows("ansel_val")}
    assert masked(rows["exact-60"]) == ["8", "7", "9", "6", "7", "8", "7", "7.4"]
    assert masked(rows["near-72"]) == ["8", "7", "9", "6", "7", "8", "4", "7.0"]
    assert masked(rows["not its own"]) == masked(rows["good-0"]) == []


def test_a_text_that_looks_like_a_score_is_not_masked(tree: Tree):
    fake = 'A ridge in the last light of the day, with no score: ,"score":8,"overall_score":7.4,'
    tree.job("fake", tree.photo("60.jpg", 60), {**scored(60), "image_description": fake}, prompt=SYSTEM_PROMPT)
    ready(tree)
    row = next(r for r in tree.rows("ansel_train") + tree.rows("ansel_val") if r["job_id"] == "fake")
    assert masked(row) == ["8", "7", "9", "6", "7", "8", "7", "7.4"]
    assert min(start for start, _ in row["masked_spans"]) > row["response"].index("7.4,")


@pytest.mark.parametrize(("level", "told"), [("reject", "they are left out"), ("warn", "they are trained on")])
def test_copied_scores_may_be_rejected_or_trained_on(tree: Tree, level: str, told: str):
    add_copies(tree)
    result = ready(tree, "--gate", f"copied_scores={level}")
    assert told in " ".join(result.output.split())
    kept = {job for job, row in verdicts(tree).items() if row["side"]}
    assert any(job.startswith("exact") for job in kept) == (level == "warn")
    assert not any(row["masked_spans"] for row in tree.rows("ansel_train"))


def test_nothing_but_copied_scores_stops_until_it_is_accepted(tmp_path: Path):
    tree = Tree(tmp_path)
    for seed in range(8):
        tree.job(f"copied-{seed}", tree.photo(f"{seed}.jpg", seed), scored(seed), prompt=SYSTEM_PROMPT)
    tree.link()
    result = tree.prepare()
    assert result.exit_code == 5 and "Traceback" not in result.output
    assert result.stderr.splitlines()[-1].startswith("Error: no scores are left to learn from")
    assert not list((tmp_path / "out").glob("*ansel_train*"))
    ready(tree, "--accept_copied_scores")
    assert len(tree.rows("ansel_train")) == 6 and all(row["masked_spans"] for row in tree.rows("ansel_train"))


def test_a_wrong_overall_score_gives_way_to_the_mean(tree: Tree):
    tree.job("wrong", tree.photo("60.jpg", 60), analysis(60, overall_score=1.0))
    tree.job("none", tree.photo("61.jpg", 61), analysis(61, overall_score=None))
    ready(tree)
    rows = {row["job_id"]: json.loads(row["response"]) for row in tree.rows("ansel_train") + tree.rows("ansel_val")}
    for job in ("wrong", "none"):
        scores = [d["score"] for d in rows[job]["dimensions"]]
        assert rows[job]["overall_score"] == round(sum(scores) / 7 + 1e-9, 1)
        assert set(verdicts(tree)[job]["verdicts"]) == {"overall"}


def test_word_salad():
    prose = [f"The light on ridge {i} leads the eye to a tree, and the sky holds back." for i in range(12)]
    assert word_salad(prose) is None and word_salad([]) is None
    terse = ["Strong lines, good balance, clear focal point.", "Soft light; muted tones; calm mood."] * 6
    assert word_salad(terse) is None
    assert "without a small word" in word_salad([SALAD, *prose[:3]])
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in prose]
    assert "articles" in word_salad(shuffled)
    start = time.process_time()
    word_salad(["word " * 200_000, "the " * 200_000, "a" * 1_000_000])
    assert time.process_time() - start < 5


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
    ready(tree, "--system_prompt", str(own), "--dimensions", "7")
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
    """Group the photographs of both sides again, without the program's record."""
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
    tree.job("newest, with a warning", "photo-0.jpg", analysis(61, overall_score=9.9), created_at="2026-02-02 10:00:00")
    tree.job("newest, rejected", "photo-0.jpg", analysis(62, technical_notes=LOOP), created_at="2026-02-03 10:00:00")
    ready(tree)
    rows = verdicts(tree)
    assert rows["newer"]["side"] and rows["newest, rejected"]["reason"] == "repetition"
    assert [rows[job]["detail"] for job in ("good-0", "newest, with a warning")] == [
        "job newer is kept for this photograph"
    ] * 2


OLDER = "".join(
    card(name, 5 + i % 3, f"The {name} of an old photograph holds.", f"Try another {name.lower()} at dusk.")
    for i, name in enumerate(DIMENSIONS7)
)
SECTIONS = ',"key_strengths":["Light"],"priority_improvements":["Depth"],"technical_notes":"Grain"}'


@pytest.mark.parametrize(
    ("system_prompt", "open_places"),
    [
        (SYSTEM_PROMPT[:-1] + SECTIONS, ["}"]),
        (
            SYSTEM_PROMPT.replace('"overall_score":7.4}', SECTIONS[1:-1] + ',"overall_score":7.4}'),
            [',"overall_score":'],
        ),
    ],
)
def test_leaving_out_what_an_older_analysis_lacks_is_not_taught(tmp_path: Path, system_prompt, open_places):
    tree = Tree(tmp_path, system_prompt=system_prompt)
    tree.good(9)
    tree.job("html", tree.photo("old.jpg", 40), page(OLDER))
    ready(tree)
    assert "sections" in verdicts(tree)["html"]["verdicts"] and not verdicts(tree)["good-1"]["verdicts"]
    rows = {row["job_id"]: row for row in tree.rows("ansel_train") + tree.rows("ansel_val")}
    assert masked(rows["html"]) == open_places and masked(rows["good-1"]) == []
    why = tree.prepare("--why", "html").output
    assert f"out of the loss: {open_places[0]}" in why and "key_strengths" in why
    ready(tree, "--gate", "sections=warn")
    assert not any(row["masked_spans"] for row in tree.rows("ansel_train") + tree.rows("ansel_val"))
    ready(tree, "--gate", "sections=reject")
    assert verdicts(tree)["html"]["reason"] == "sections"


def test_sections_that_the_prompt_does_not_ask_for_are_not_missed(tree: Tree):
    tree.job("short", tree.photo("short.jpg", 50), analysis(50, technical_notes=None))
    ready(tree)
    assert verdicts(tree)["short"]["verdicts"] == {}


# ------------------------------------------------------------------------------------------------ ranges of scores


def scaled(seed: int, highest: float) -> dict:
    """An analysis with scores on another scale."""
    found = analysis(seed)
    for item in (*found["dimensions"], found):
        key = "score" if "score" in item else "overall_score"
        item[key] = round(item[key] * highest / 10, 3)
    return found


@pytest.mark.parametrize(
    ("highest", "says"),
    [(100, "Scores: 0-100."), (1, "Scores are decimals between 0.0 and 1.0."), (5, "Rate out of 5 stars.")],
)
def test_scores_of_another_range(tmp_path: Path, highest, says):
    prompt = re.sub(r'"(score|overall_score)":[\d.]+', r'"\1": <score>', SYSTEM_PROMPT)
    tree = Tree(tmp_path, system_prompt=f"{says}\n{prompt}")
    for seed in range(10):
        found = scaled(seed, highest)
        found["dimensions"][0]["score"] = f"{found['dimensions'][0]['score']}/{highest}"
        tree.job(f"good-{seed}", tree.photo(f"photo-{seed}.jpg", seed), found)
    tree.job("outside", tree.photo("outside.jpg", 50), scaled(50, highest * 9))
    tree.link()
    assert tree.reasons() == {"outside": "score_out_of_range"}
    assert f"to {highest}" in tree.rows("manifest_rejected")[0]["detail"]
    assert all(row["prompt_range"][1] == highest for row in tree.rows("manifest"))
    assert tree.prepare().exit_code == 0
    specification = read_specification(f"{says}\n{prompt}")
    rows = tree.rows("ansel_train") + tree.rows("ansel_val")
    assert len(rows) == 10 and tree.meta()["gates"]["overall"]["found"] == 0
    assert [specification.check(row["response"]) for row in rows] == [[]] * 10
    card = (tree.folder / "out/training_data_ansel_card.html").read_text()
    counts = [re.findall(r"(\d+) and (\d+)", told) for told in re.findall(r'aria-label="([^"]*)"', card)]
    assert [sum(int(n) for pair in found for n in pair) for found in counts if found][:2] == [10, 10]


def test_analyses_of_another_scale_than_todays_prompt_are_left_out(tree: Tree):
    prompt = SYSTEM_PROMPT + " Scores are whole numbers from 0 to 100."
    tree.job("percent", tree.photo("percent.jpg", 50), scaled(50, 100), prompt=prompt)
    tree.job("low", tree.photo("low.jpg", 51), scaled(51, 10), prompt=prompt)
    ready(tree)
    assert {row["job_id"]: row["reason"] for row in tree.rows("ansel_verdicts") if row["reason"]} == {
        "percent": "score_range",
        "low": "score_range",
    }
    assert "scored from 0 to 100, the prompt asks for 1 to 10" in verdicts(tree)["low"]["detail"]


def test_a_range_that_no_prompt_tells_is_named(tmp_path: Path):
    tree = Tree(tmp_path, system_prompt=re.sub(r'"(score|overall_score)":[\d.]+', r'"\1": <score>', SYSTEM_PROMPT))
    for seed in range(6):
        tree.job(f"good-{seed}", tree.photo(f"photo-{seed}.jpg", seed), scaled(seed, 100))
    assert tree.link().exit_code == 1 and "--score_range" in tree.link().output
    assert tree.link("--score_range", "0-100").exit_code == 0
    assert tree.prepare("--score_range", "0-100").exit_code == 0
    assert tree.meta()["specification"]["score_range"] == [0, 100]
    for wrong in ("100", "5-1", "ten", "0-100000"):
        result = tree.link("--score_range", wrong)
        assert result.exit_code == 1 and f"--score_range {wrong}: write the lowest" in result.output


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
        assert "split again" not in result.stderr
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


def test_a_lost_record_is_made_anew_from_the_files_of_the_round(tree: Tree):
    tree.good(30, 20)
    ready(tree, "--train_split", "0.7")
    before, record = sides_of(tree), tree.folder / "out/training_data_ansel_split.json"
    whole = json.loads(record.read_text())
    record.unlink()
    tree.good(20, 100)
    result = ready(tree, "--train_split", "0.7")
    assert f"{record} is gone: the sides of 40 photographs were taken from" in result.stderr.replace("\n  ", " ")
    assert {path: sides_of(tree)[path] for path in before} == before
    again = json.loads(record.read_text())["photographs"]
    assert {sha: again[sha] for sha in whole["photographs"]} == whole["photographs"]
    record.unlink()
    val = tree.folder / "out/training_data_ansel_val.jsonl"
    val.write_text(
        json.dumps({key: value for key, value in tree.rows("ansel_val")[0].items() if key != "image_sha256"})
    )
    result = tree.prepare()
    assert result.exit_code == 1
    assert f"{val}:1: does not name its photograph, and the split record is gone; restore the record" in result.stderr
    val.write_text(json.dumps({**tree.rows("ansel_train")[0], "image_path": [[1]]}))
    assert "does not name its photograph" in tree.prepare().stderr


def test_the_order_of_the_manifest_changes_nothing(tree: Tree):
    for seed in range(60, 70):
        name = tree.photo(f"{seed}.jpg", seed)
        for twin in "ab":
            tree.job(f"{twin}-{seed}", name, analysis(seed + 100 * (twin == "a")), created_at="2026-03-01 10:00:00")
    ready(tree)
    out = tree.folder / "out"
    names = [f"training_data_ansel_{name}" for name in ("train.jsonl", "val.jsonl", "verdicts.jsonl", "split.json")]
    before = [(out / name).read_bytes() for name in names]
    manifest = out / "training_data_manifest.jsonl"
    lines = manifest.read_text().splitlines()
    random.Random(0).shuffle(lines)
    manifest.write_text("\n".join(lines))
    for name in names:
        (out / name).unlink()
    assert tree.prepare().exit_code == 0
    assert [(out / name).read_bytes() for name in names] == before


def test_few_validation_photographs_are_told(tree: Tree):
    result = ready(tree)
    assert "2 of the 5 validation photographs that evaluation needs" in " ".join(result.stderr.split())
    assert tree.meta()["headline"]["text"] == "Not ready: 2 validation photographs, and evaluation needs 5"
    assert "validation photographs that" not in ready(tree, "--val_split", "0.5").stderr


@pytest.mark.parametrize("kill_at", range(6))
def test_a_killed_run_leaves_no_mixed_set(tree: Tree, monkeypatch: pytest.MonkeyPatch, kill_at: int):
    ready(tree)
    out = tree.folder / "out"
    train, val = (out / f"training_data_ansel_{side}.jsonl" for side in ("train", "val"))
    before = train.read_bytes()
    tree.good(10, 60)
    tree.link()
    done, replace = [], os.replace

    def killed(source, target):
        if "ansel" in target.name and target.suffix not in (".html", ".yaml"):
            if len(done) == kill_at:
                raise SystemExit(9)
            done.append(Path(target).name.removeprefix("training_data_ansel_"))
        replace(source, target)

    monkeypatch.setattr("common.files.os.replace", killed)
    tree.prepare()
    monkeypatch.undo()
    assert done == ["split.json", "val.jsonl", "verdicts.jsonl", "meta.json", "train.jsonl"][:kill_at]
    if kill_at == 5:
        assert read_meta(train, val)["counts"]["linked"] == 20
    else:
        assert train.read_bytes() == before
        with pytest.raises(UserError, match="prepare the data again") if kill_at > 1 else contextlib.nullcontext():
            read_meta(train, val)
    assert tree.prepare().exit_code == 0
    assert read_meta(train, val)["counts"]["linked"] == 20 and not list(out.glob(".*.tmp"))


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
    monkeypatch.setattr(prepare_training_data, "write_set", interrupted)
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
    assert "the earlier split had seed 42 and val_split 0.2: split again" in " ".join(result.stderr.split())
    assert "split again" not in ready(tree, "--seed", "7").stderr
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"overall_score": None}, "overall_score is null; a number from 0 to 1000 was expected"),
        ({"dimensions": [{"name": "Mood"}]}, "Mood has no score"),
        ({"dimensions": [{"name": "Mood", "score": "8"}]}, 'Mood\'s score is "8"; a number'),
        ({"dimensions": [{"name": "Mood", "score": 8, "comment": None}]}, "Mood's comment is null; a text"),
        ({"dimensions": [{"name": "Mood", "score": 8}] * 2}, "Mood stands there twice"),
        ({"dimensions": []}, "holds no list of dimensions"),
        ({"key_strengths": "Light"}, 'key_strengths is "Light"; a list of texts'),
    ],
)
def test_a_damaged_analysis_is_told_by_its_field(tree: Tree, change, says):
    tree.link()
    path = tree.folder / "out/training_data_manifest.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[1])
    path.write_text("\n".join([lines[0], json.dumps({**row, "analysis": {**row["analysis"], **change}})]))
    assert f"{path}:2: analysis: {says}" in tree.prepare().stderr


def test_damaged_manifests(tree: Tree):
    tree.link()
    path = tree.folder / "out/training_data_manifest.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])
    damaged = [{**row, "mends": "none"}, {**row, "analysis": {"dimensions": [{}]}}]
    path.write_text("\n".join([lines[0], lines[1][:-1], "[]", '{"job_id": "x"}', *map(json.dumps, damaged)]))
    result = tree.prepare()
    assert result.exit_code == 1
    assert [line.strip().removeprefix("Error: ") for line in result.stderr.splitlines()] == [
        f"{path}:2: not valid JSON (Expecting ',' delimiter); link the data again or mend the row",
        f"{path}:3: a JSON object was expected; link the data again or mend the row",
        f"{path}:4: image_path, image_sha256, advisor, image_thumb, analysis missing; link the data again or mend "
        "the row",
        f'{path}:5: mends is "none"; a list of texts was expected; link the data again or mend the row',
        f"{path}:6: analysis: its dimension 1 has no name; link the data again or mend the row",
    ]
    path.write_text(json.dumps({**row, "image_thumb": "AAAA"}))
    assert tree.prepare().stderr == f"Error: {path}:1: image_thumb is not of this version; link the data again\n"
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
        (("--prompts_db", "nowhere.db"), "nowhere.db: no such database; name another with --prompts_db"),
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


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = color.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_the_card_can_be_read_by_everyone(tree: Tree):
    tree.job("copy", reencoded(tree, "photo-0.jpg", "copy.jpg"), analysis(300))
    ready(tree)
    html = (tree.folder / "out/training_data_ansel_card.html").read_text()
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert html.count("<th ") == html.count("<th scope=") > 10
    assert all(re.findall(r'<img [^>]*alt="([^"]*)"', html)) and html.count("<img ") == html.count(" alt=")
    assert "Overall score <b>" in html and "<dt>Color Harmony</dt>" in html and "<summary>Analysis</summary>" in html
    assert "2 files, " in html and "copy.jpg (kept)" in html
    assert html.count("holds the eye for a while") >= 10 * 7  # the comments of each photograph, to unfold
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w+)", theme)) for theme in re.findall(r":root \{[^}]*--ink[^}]*\}", html)
    ]
    grounds = {"ink": ("ground", "panel", "rule"), "soft": ("ground", "panel"), "bad": ("bad-ground",)}
    grounds |= {"warn": ("warn-ground",), "ink ": ("warn-ground", "good-ground", "bad-ground")}
    for theme in themes:
        for text, below in grounds.items():
            for ground in below:
                light, dark = sorted((luminance(theme[text.strip()]), luminance(theme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
    assert len(themes) == 2


def test_why_tells_the_raw_text_and_each_verdict(tree: Tree):
    tree.job("copied-1", tree.photo("60.jpg", 60), scored(60), prompt=SYSTEM_PROMPT)
    tree.link()
    result = tree.prepare("--why", "copied")
    assert result.exit_code == 0 and not list((tree.folder / "out").glob("*ansel*"))
    assert json.dumps(scored(60)) in result.output
    assert read_specification(SYSTEM_PROMPT).render(scored(60)) in result.output
    assert "out of the loss: 8, 7, 9, 6, 7, 8, 7, 7.4" in result.output
    assert "copied_scores (mask): 8, 7, 9, 6, 7, 8, 7 with 7.4" in result.output
    assert all(f"{gate} (" in result.output for gate in GATES)
    assert result.output.rstrip().endswith("an example")
    tree.connection.execute("DELETE FROM jobs")
    tree.connection.commit()
    assert "(not there any more" in tree.prepare("--why", "copied").output
    result = tree.prepare("--why", "nothing")
    assert result.exit_code == 1 and "no linked job whose id begins with 'nothing'" in result.stderr


def test_progress_and_tables_fit_the_terminal(tree: Tree):
    tree.job("bad", tree.photo("60.jpg", 60), analysis(60, image_description=CHINESE))
    result = ready(tree)
    after = result.stdout[result.stdout.index("Left to learn") :].splitlines()
    assert max(map(len, (line for line in after if "/" not in line))) <= 100  # paths and commands are not wrapped


def test_length_is_counted_in_the_pixels_that_training_sees():
    from common.data.lengths import LengthCounter

    counter = LengthCounter("none", 1024)
    assert counter.image((4032, 3024)) == 32 * 24  # 1024 x 768 in squares of 32
    assert counter.image((100, 100)) == 8 * 8  # never under 65,536 pixels
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1000)).save(buffer, "JPEG")
    buffer.seek(0)
    assert counter.image(load_photo(buffer).size) == counter.image((2000, 1000))
