"""`install`: on the stand-in, on other services of the family, on files of other habits; refusals."""

import ast
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from integration.lora_patch.commands import main
from integration.lora_patch.source_file import BY_HAND
from tests.standin.running import PATCH, ROOT, STANDIN, VARIANTS

SERVICES = [STANDIN, *VARIANTS]
TEXT = STANDIN.read_text()


def patch_command(*arguments) -> subprocess.CompletedProcess:
    """Run the command in this process: what it prints, and its exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # what Python prints of it, and makes of it
                print(code, file=err)
                code = 1
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def installed(tmp_path: Path, content: str | bytes, name: str = "ai_advisor_service.py") -> tuple[Path, str]:
    """Install into a service of this content; returns (file, what was printed)."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = patch_command("install", "--service", file)
    assert done.returncode == 0, done.stderr
    return file, done.stdout


def refused(tmp_path: Path, content: str | bytes) -> str:
    """Return what is said on refusing a service of this content, which must be left alone."""
    file = tmp_path / "ai_advisor_service.py"
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(content)
    done = patch_command("install", "--service", file)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""
    assert file.read_bytes() == content and os.listdir(tmp_path) == [file.name]
    checked = patch_command("install", "--service", file, "--check")
    assert checked.returncode == 1 and checked.stderr == done.stderr
    return done.stderr


def changed(old: str, new: str, count: int = 1) -> str:
    assert TEXT.count(old) == count, old
    return TEXT.replace(old, new)


def test_the_diff_that_the_guide_shows_is_what_install_does(tmp_path):
    file, said = installed(tmp_path, TEXT)
    diff = (ROOT / "integration" / "service.diff").read_text()
    assert said.endswith(diff) and said.startswith(f"{file}: 6 lines inserted")
    applied = tmp_path / "by_hand" / "ai_advisor_service.py"
    applied.parent.mkdir()
    shutil.copy(STANDIN, applied)
    subprocess.run(["git", "apply", "-p1", str(ROOT / "integration" / "service.diff")], cwd=applied.parent, check=True)
    assert applied.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("source", SERVICES, ids=lambda path: path.stem)
def test_install_twice_check_and_uninstall(source, tmp_path):
    file = tmp_path / source.name
    shutil.copy(source, file)
    file.chmod(0o750)
    before = file.read_bytes()

    checked = patch_command("install", "--service", file, "--check")
    assert checked.returncode == 0 and "not installed;" in checked.stdout and os.listdir(tmp_path) == [file.name]
    assert patch_command("install", "--service", file).returncode == 0
    after = file.read_bytes()
    assert after != before and file.stat().st_mode & 0o777 == 0o750
    assert contents(tmp_path / "lora_patch") == contents(PATCH)
    assert file.with_name(file.name + ".before_lora").read_bytes() == before
    compile(after, file.name, "exec")

    for arguments in ([], ["--check"]):
        again = patch_command("install", "--service", file, *arguments)
        assert again.returncode == 0 and "installed already, nothing to do" in again.stdout
        assert file.read_bytes() == after

    out = patch_command("install", "--service", file, "--uninstall", "--check")
    assert out.returncode == 0 and file.read_bytes() == after
    out = patch_command("install", "--service", file, "--uninstall")
    assert out.returncode == 0 and "byte for byte as it was" in out.stdout
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]
    again = patch_command("install", "--service", file, "--uninstall")
    assert again.returncode == 0 and "not installed, nothing to do" in again.stdout


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tabs(text: str) -> str:
    return re.sub(r"^( {4})+", lambda spaces: "\t" * (len(spaces[0]) // 4), text, flags=re.M)


HABITS = {
    "CRLF": TEXT.replace("\n", "\r\n").encode(),
    "tabs": tabs(TEXT).encode(),
    "a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "Latin-1": ("# -*- coding: latin-1 -*-\n" + TEXT.replace("Upload", "Höchstmaß")).encode("latin-1"),
    "no line end at the end": TEXT.rstrip().encode(),
    "text beyond ASCII": TEXT.replace('"Analysis failed"', '"Analyse 失敗 📷 misslungen"').encode(),
    "form feeds": TEXT.replace("\n\n\n", "\n\x0c\n\n").encode(),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_files_are_kept(habit, tmp_path):
    before = HABITS[habit]
    file, _ = installed(tmp_path, before)
    after = file.read_bytes()
    compile(after, file.name, "exec")
    assert after.count(b"lora_patch") - before.count(b"lora_patch") == 6
    if habit == "CRLF":
        assert after.count(b"\n") == after.count(b"\r\n")
    if habit == "tabs":
        assert not re.search(rb"^ +lora_patch", after, re.M)
    # apart from the one call that is wrapped, lines are only added
    others = [
        [line for line in side.splitlines() if not re.search(rb"lora_patch|mlx_vlm.generate\(", line)]
        for side in (before, after)
    ]
    assert others[0] == others[1]
    assert patch_command("install", "--service", file, "--uninstall").returncode == 0
    assert file.read_bytes() == before


def test_only_the_standard_library_is_needed(tmp_path):
    file = tmp_path / "ai_advisor_service.py"
    shutil.copy(STANDIN, file)
    command = [sys.executable, "-I", "-S", str(PATCH), "install", "--service", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_uses_nothing_of_this_repository():
    imports = set()
    for path in PATCH.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imports.add(node.module.split(".")[0])
    brought_by_mlx_vlm = {"PIL", "huggingface_hub", "llguidance", "mlx", "mlx_vlm", "numpy"}
    assert imports - set(sys.stdlib_module_names) <= brought_by_mlx_vlm


@pytest.mark.parametrize("code", ["import lora_patch; lora_patch.start", "from lora_patch import commands, install"])
def test_what_every_start_imports_is_light(code):
    slow = "{'numpy', 'PIL', 'mlx', 'mlx_vlm', 'huggingface_hub'}"
    command = [sys.executable, "-c", f"import sys; {code}; print(sorted({slow} & set(sys.modules)))"]
    done = subprocess.run(command, cwd=PATCH.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_link_to_the_service_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "ai_advisor_service.py"
    shutil.copy(STANDIN, real)
    link = tmp_path / "service.py"
    link.symlink_to(real)
    assert patch_command("install", "--service", link).returncode == 0
    assert link.is_symlink() and b"lora_patch" in real.read_bytes()
    assert (real.parent / "lora_patch" / "hooks.py").is_file()


def test_changes_made_since_survive_an_uninstall(tmp_path):
    file, _ = installed(tmp_path, TEXT)
    text = file.read_text().replace('"status": "UP"', '"status": "FINE"').replace("timeout=30", "timeout=60")
    file.write_text(text)
    done = patch_command("install", "--service", file, "--uninstall")
    assert done.returncode == 0 and "your later changes kept" in done.stdout
    assert file.read_text() == TEXT.replace('"status": "UP"', '"status": "FINE"').replace("timeout=30", "timeout=60")


@pytest.mark.parametrize("how", ["single file", "older folder", "not ours"])
def test_what_lies_beside_the_service_is_brought_up_to_date(how, tmp_path):
    """A service patched with the one file of before gets the folder; an older folder is replaced as a whole."""
    file, _ = installed(tmp_path, TEXT)
    before, folder = file.read_bytes(), tmp_path / "lora_patch"
    single = tmp_path / "lora_patch.py"
    if how == "older folder":
        (folder / "hooks.py").write_text("# an older one\n")
        (folder / "gone_since.py").write_text("")
    else:
        shutil.rmtree(folder)
        ours = '"""Serve LoRA adapters from ai_advisor_service.py: arms per request"""\n'
        single.write_text(ours if how == "single file" else "# somebody else's\n")
    done = patch_command("install", "--service", file)
    assert done.returncode == 0 and "brought up to date" in done.stdout
    assert contents(folder) == contents(PATCH) and file.read_bytes() == before
    kept = ["lora_patch.py.before_lora"] if how == "not ours" else []
    assert sorted(os.listdir(tmp_path)) == sorted([file.name, f"{file.name}.before_lora", "lora_patch", *kept])


def test_a_folder_copied_by_hand_serves_its_commands(tmp_path):
    file = tmp_path / "ai_advisor_service.py"
    shutil.copy(STANDIN, file)
    shutil.copytree(PATCH, tmp_path / "lora_patch")
    for arguments, said in (
        (["install", "--service", file.name], "6 lines inserted"),
        (["install", "--service", file.name], "nothing to do"),
        (["check", "--lora_path", "nowhere"], "lora_patch: nowhere: no such adapter folder"),
        (["report", "--db", "nowhere.db"], "lora_patch: nowhere.db: no such database"),
        (["install", "--service", file.name, "--uninstall"], "byte for byte"),
    ):
        command = [sys.executable, "lora_patch", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert file.read_bytes() == STANDIN.read_bytes() and os.listdir(tmp_path) == [file.name]


def test_a_service_in_a_package_finds_the_module_either_way(tmp_path):
    package = tmp_path / "mondrian"
    package.mkdir()
    (package / "__init__.py").write_text("")
    file, _ = installed(package, TEXT)
    assert "    from mondrian import lora_patch\n" in file.read_text()
    (tmp_path / "quick" / "mlx_vlm").mkdir(parents=True)  # --help needs no model: nothing to wait seconds for
    (tmp_path / "quick" / "mlx_vlm" / "__init__.py").write_text("")
    (tmp_path / "quick" / "mlx_vlm" / "prompt_utils.py").write_text("apply_chat_template = None\n")
    quick = {**os.environ, "PYTHONPATH": str(tmp_path / "quick")}
    for command in (["-m", "mondrian.ai_advisor_service"], ["mondrian/ai_advisor_service.py"]):
        command = [sys.executable, *command, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=quick, capture_output=True, text=True)
        assert done.returncode == 0 and "--lora_path" in done.stdout, done.stderr
    assert patch_command("install", "--service", file, "--uninstall").returncode == 0
    assert file.read_text() == TEXT


# shapes that other services of the family may have; each must lead to the line (or refusal) beside it
SHAPES = {
    "job id made in the view": (
        changed('request.form.get("job_id") or str(uuid.uuid4())', "uuid.uuid4().hex"),
        "lora_patch.choose(job_id=job_id, advisor=advisor)",
    ),
    "other names": (
        TEXT.replace("job_id", "analysis_key")
        .replace('request.form.get("analysis_key")', 'request.form.get("job-id")')
        .replace('advisor = request.form.get("advisor", "ansel")', 'voice = request.form.get("advisor", "ansel")')
        .replace("advisor not in", "voice not in"),
        "lora_patch.choose(job_id=analysis_key, advisor=voice)",
    ),
    "fields from JSON": (
        TEXT.replace("request.form.get(", "(request.get_json(silent=True) or request.form).get("),
        "lora_patch.choose(job_id=job_id, advisor=advisor)",
    ),
    "several advisors in a loop": (
        changed(
            "        response = run_model_mlx(prompt, image_path=str(image_path))",
            "        for one in advisor.split(','):\n"
            "            response = run_model_mlx(prompt, image_path=str(image_path))",
        ),
        "            lora_patch.choose(job_id=job_id, advisor=one)\n            response = run_model_mlx",
    ),
    "a list of advisors": (
        changed('advisor = request.form.get("advisor", "ansel")', 'advisors = request.form.getlist("advisors")')
        .replace("if advisor not in ADVISORS:", "if not advisors:")
        .replace("    try:\n        rag_context", "    for advisor in advisors:\n        rag_context")
        .replace(
            "    except Exception as error:\n        logger.exception",
            "    if not advisors:\n        error = None\n        logger.error",
        ),
        "        lora_patch.choose(job_id=job_id, advisor=advisor)\n        response = run_model_mlx",
    ),
    "a row of the advisor": (
        changed(
            '    mode = request.form.get("mode", "baseline")\n',
            '    mode = request.form.get("mode", "baseline")\n    who = advisor\n    advisor_row = {"id": who}\n',
        )
        .replace(
            'advisor = request.form.get("advisor", "ansel")', 'wanted = request.form.get("advisor", "ansel").strip()'
        )
        .replace("who = advisor", "advisor = {'id': wanted}")
        .replace("if advisor not in", "if wanted not in"),
        "lora_patch.choose(job_id=job_id, advisor=wanted)",
    ),
    "no variable of its own": (
        changed('advisor = request.form.get("advisor", "ansel")', "pass")
        .replace("advisor not in ADVISORS", 'request.form["advisor"] not in ADVISORS')
        .replace("advisor=advisor, mode", 'advisor=request.form["advisor"], mode')
        .replace("build_full_prompt(advisor, rag_context)", 'build_full_prompt(request.form["advisor"], rag_context)'),
        "    lora_patch.choose(job_id=job_id)\n",
    ),
    "a name for the function": (
        changed("    with _generation_lock:\n", "    ask = mlx_vlm.generate\n    with _generation_lock:\n").replace(
            "output = mlx_vlm.generate(", "output = ask("
        ),
        "output = lora_patch.generation(ask)(",
    ),
    "annotated": (
        changed("model, processor = get_mlx_model()", "model, processor = get_mlx_model(); tokens: int = 5"),
        None,
    ),
    "import of the function": (
        changed("import mlx_vlm\n", "from mlx_vlm import load as load_model, generate as ask\n")
        .replace("mlx_vlm.load(", "load_model(")
        .replace("mlx_vlm.generate(", "ask("),
        "lora_patch.generation(ask)(",
    ),
    "waitress": (
        changed("    app.run(host", "    from waitress import serve\n    serve(app, host").replace(
            ", threaded=True)", ")"
        ),
        "lora_patch.start(app, get_mlx_model, db_path=DB_PATH)",
    ),
    "parse_known_args": (
        changed("args = parser.parse_args()", "args, unknown = parser.parse_known_args()"),
        "lora_patch.add_arguments(parser)\nargs, unknown",
    ),
    "no parser": (
        changed("args = parser.parse_args()", "args = options"),
        '"""\n\nimport lora_patch\nlora_patch.add_arguments()\nimport argparse\n',
    ),
    "a method of the service's class": (
        changed('@app.route("/analyze", methods=["POST"])\ndef analyze():', "def respond():").replace(
            'if __name__ == "__main__":\n',
            "class Service:\n    def __init__(self):\n        app.add_url_rule('/analyze', 'analyze', self.analyze)\n\n"
            "    def analyze(self):\n        advisor = request.form['advisor']\n"
            '        return jsonify(run_model_mlx(advisor))\n\n\nif __name__ == "__main__":\n',
        ),
        "        lora_patch.choose(advisor=advisor)\n        return jsonify(run_model_mlx(advisor))",
    ),
    "a module by its name": (
        changed("import mlx_vlm\n", 'import importlib\n\nmlx_vlm = importlib.import_module("mlx_vlm")\n').replace(
            "from mlx_vlm.prompt_utils import apply_chat_template\n", "apply_chat_template = print\n"
        ),
        "output = lora_patch.generation(mlx_vlm.generate)(",
    ),
    "an object that is called": (
        changed(
            "response = run_model_mlx(prompt, image_path=str(image_path))", "response = backend(prompt, image_path)"
        ).replace(
            "def get_prompts(",
            "class Backend:\n    def __call__(self, *given):\n        return run_model_mlx(*given)"
            "\n\n\nbackend = Backend()\n\n\ndef get_prompts(",
        ),
        "lora_patch.choose(job_id=job_id, advisor=advisor)",
    ),
    "an app that is made where it runs": (
        changed("app = Flask(__name__)", "app = Flask(__name__)\n\n\ndef create_app():\n    return app").replace(
            "    app.run(host", "    create_app().run(host"
        ),
        "    lora_patch.start(create_app(), get_mlx_model, db_path=DB_PATH).run(host",
    ),
    "all in one line": (
        changed("args = parser.parse_args()", "if True: args = parser.parse_args()"),
        "if True: args = lora_patch.add_arguments(parser).parse_args()",
    ),
    "a loader with a default": (
        changed("def get_mlx_model():", "def get_mlx_model(reload=False):"),
        "lora_patch.start(app, get_mlx_model, db_path=DB_PATH)",
    ),
    "a route by rule": (
        changed('@app.route("/analyze", methods=["POST"])\n', "").replace(
            'if __name__ == "__main__":\n',
            'app.add_url_rule("/analyze", view_func=analyze)\n\nif __name__ == "__main__":\n',
        ),
        "lora_patch.choose(job_id=job_id, advisor=advisor)",
    ),
    "a view class": (
        changed('@app.route("/analyze", methods=["POST"])\ndef analyze():', "def respond():").replace(
            'if __name__ == "__main__":\n',
            "class Analyze(MethodView):\n    def post(self):\n        advisor = request.form['advisor']\n"
            "        return jsonify(run_model_mlx(advisor))\n\n\n"
            'app.add_url_rule("/analyze", view_func=Analyze.as_view("analyze"))\n\nif __name__ == "__main__":\n',
        ),
        "        lora_patch.choose(advisor=advisor)\n        return jsonify(run_model_mlx(advisor))",
    ),
    "a decorated function in the view": (
        changed(
            "    try:\n        rag_context",
            "    @stream_with_context\n    def events():\n        yield run_model_mlx(advisor, image_path)\n\n"
            "    if mode == 'stream':\n        return Response(events())\n    try:\n        rag_context",
        ),
        "    lora_patch.choose(job_id=job_id, advisor=advisor)\n    @stream_with_context\n",
    ),
    "the server in a thread": (
        changed(
            'app.run(host="127.0.0.1", port=PORT, threaded=True)',
            'server = threading.Thread(target=app.run, kwargs={"port": PORT})\n    server.start()',
        ),
        "lora_patch.start(app, get_mlx_model, db_path=DB_PATH)\n    server = threading.Thread(target=app.run",
    ),
    "annotated variables": (
        changed("app = Flask(__name__)", "service: Flask = Flask(__name__)")
        .replace("@app.", "@service.")
        .replace("app.run(", "service.run(")
        .replace("parser = argparse.ArgumentParser(", "cli: argparse.ArgumentParser = argparse.ArgumentParser(")
        .replace("parser.", "cli."),
        "lora_patch.start(service, get_mlx_model",
    ),
    "a blueprint": (
        changed('@app.route("/analyze"', '@blueprint.route("/api/analyze"').replace(
            "app = Flask(__name__)",
            'from flask import Blueprint\n\nblueprint = Blueprint("api", __name__)\napp = Flask(__name__)',
        ),
        "lora_patch.choose(job_id=job_id, advisor=advisor)",
    ),
    "generation given to a pool": (
        changed(
            "output = mlx_vlm.generate(\n            model,",
            "output = pool.submit(\n            mlx_vlm.generate, model,",
        ),
        "lora_patch.carry(lora_patch.generation(mlx_vlm.generate)), model",
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_of_the_service(shape, tmp_path):
    before, expected = SHAPES[shape]
    file, _ = installed(tmp_path, before)
    assert expected is None or expected in file.read_text()
    assert patch_command("install", "--service", file, "--uninstall").returncode == 0
    assert file.read_text() == before


REFUSED = {
    "a syntax error": (changed("def run_model_mlx(", "def run_model_mlx(("), ":72: not valid Python"),
    "no loading": (changed("mlx_vlm.load(MLX_MODEL)", "loader()"), "no call of mlx_vlm.load found"),
    "no generation": (
        TEXT.replace("mlx_vlm.generate(", "ask(").replace("run_model_mlx", "run_model"),
        "no call of mlx_vlm.generate",
    ),
    "no analyze": (changed('@app.route("/analyze"', '@app.route("/judge"'), "no view of /analyze found"),
    "no run": (changed("app.run(", "launch("), "no app.run(...) found"),
    "an async view": (changed("def analyze():", "async def analyze():"), "analyze is async"),
    "async generation": (changed("def run_model_mlx(", "async def run_model_mlx("), "run_model_mlx is async"),
    "no advisor": (TEXT.replace("advisor", "voice"), "which variable of analyze holds the advisor is not clear"),
    "a flag of its own": (
        changed(
            'parser.add_argument("--max_tokens"',
            'parser.add_argument("--lora_path")\nparser.add_argument("--max_tokens"',
        ),
        "the service has a flag --lora_path of its own",
    ),
    "an adapter of its own": (
        changed("load(MLX_MODEL)", 'load(MLX_MODEL, adapter_path="x")'),
        "loads an adapter of its own",
    ),
    "a worker's queue": (
        changed(
            "response = run_model_mlx(prompt, image_path=str(image_path))", "response = work.put((prompt, image_path))"
        )
        + "\n\ndef worker():\n    run_model_mlx(*work.get())\n",
        "no view of /analyze found that leads to the model",
    ),
    "bare carriage returns": (TEXT.replace("\n", "\r"), "bare carriage return"),
    "torch": (
        changed("import mlx_vlm\n", "import torch\n").replace("mlx_vlm.", "torch.").replace("from mlx_vlm", "from x"),
        "torch, not MLX: the service runs its model with PyTorch (import torch)",
    ),
    "two databases": (
        changed(
            "def save_job(",
            'OLD = "old.db"\nwith sqlite3.connect(OLD) as old:\n    old.execute("SELECT 1 FROM jobs")'
            "\n\n\ndef move():\n    sqlite3.connect(OLD).execute('SELECT * FROM jobs')\n\n\ndef save_job(",
        ),
        "which database holds the jobs is not clear (OLD, DB_PATH); name it with --db",
    ),
    "an empty file": ("", "no call of mlx_vlm.load found"),
    "NUL bytes": (TEXT.replace("PORT = ", "\0PORT = "), "not valid Python"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused_and_left_alone(kind, tmp_path):
    content, expected = REFUSED[kind]
    assert expected in refused(tmp_path, content)


def test_a_refusal_names_the_lines_to_add_by_hand(tmp_path):
    """All six, with the places of those that have one, so that no second attempt is needed to see the rest."""
    said = refused(tmp_path, REFUSED["a worker's queue"][0])
    assert "nothing was changed; the lines to add by hand:" in said
    assert all(text in said for text in BY_HAND.values())
    assert f"{BY_HAND['add_arguments']}  (before line 38)" in said and f"{BY_HAND['choose']}\n" in said


def test_a_service_with_lora_flags_of_its_own_is_told_what_to_remove(tmp_path):
    own = changed(
        'parser.add_argument("--max_tokens"',
        'parser.add_argument("--lora-path")\nparser.add_argument("--model_mode")\nparser.add_argument("--max_tokens"',
    ).replace("load(MLX_MODEL)", "load(MLX_MODEL, adapter_path=args.lora_path)")
    said = refused(tmp_path, own)
    for text in (
        ":37: the service has a flag --lora-path of its own; remove it, and what uses it in line 66",
        ":38: the service has a flag --model_mode of its own; remove it\n",
        ":66: the service loads an adapter of its own; remove adapter_path=args.lora_path from this call",
    ):
        assert text in said


@pytest.mark.parametrize("kept", [1, 3, 4])
def test_a_partly_patched_file_is_completed(kept, tmp_path):
    file, _ = installed(tmp_path, TEXT)
    whole = file.read_text()
    lines = [line for line in whole.splitlines(keepends=True) if "lora_patch." in line]
    part = whole
    for line in lines[kept:]:
        part = part.replace(line, line.replace("lora_patch.generation(mlx_vlm.generate)", "mlx_vlm.generate")
                            if "generation(" in line else "")  # fmt: skip
    part = part.replace("import lora_patch\n", "") if kept == 1 else part
    file.write_text(part)
    checked = patch_command("install", "--service", file, "--check")
    assert "partly installed;" in checked.stdout and file.read_text() == part
    done = patch_command("install", "--service", file)
    assert done.returncode == 0 and file.read_text() == whole
    assert patch_command("install", "--service", file, "--uninstall").returncode == 0
    assert file.read_text() == TEXT and os.listdir(tmp_path) == [file.name]


DATABASES = {
    "a parameter": (
        TEXT.replace(
            "def save_job(job_id, status, **columns)", "def save_job(job_id, status, db_path=DB_PATH, **columns)"
        ).replace("sqlite3.connect(DB_PATH, timeout=30)", "sqlite3.connect(db_path, timeout=30)"),
        "db_path=DB_PATH",
    ),
    "a parameter that callers give": (
        re.sub(r"sqlite3.connect\(DB_PATH[^)]*\)", "open_jobs(JOBS)", TEXT)
        .replace("PORT = ", 'JOBS = Path("jobs.db")\nPORT = ', 1)
        .replace("def save_job(", "def open_jobs(file):\n    return sqlite3.connect(file)\n\n\ndef save_job("),
        "db_path=JOBS",
    ),
    "an imported constant": (
        TEXT.replace("import mlx_vlm\n", "import mlx_vlm\nfrom settings import DB_PATH\n", 1).replace(
            re.search(r"^DB_PATH = .*\n", TEXT, re.M)[0], ""
        ),
        "db_path=DB_PATH",
    ),
    "a constant of an imported module": (
        TEXT.replace("sqlite3.connect(DB_PATH", "sqlite3.connect(settings.DB").replace(
            "import mlx_vlm\n", "import mlx_vlm\nimport settings\n", 1
        ),
        "db_path=settings.DB",
    ),
    "a helper module": (
        re.sub(r"sqlite3.connect\(DB_PATH[^)]*\)", "helper.connect(DB_PATH)", TEXT).replace(
            "import sqlite3\n", "import helper\n"
        ),
        "db_path=DB_PATH",
    ),
    "an attribute": (
        TEXT.replace("sqlite3.connect(DB_PATH, timeout=30)", "STORE.open()").replace(
            "def save_job(",
            "class Store:\n    def __init__(self, path):\n        self.path = path\n\n    def open(self):\n"
            "        return sqlite3.connect(self.path)  # jobs\n\n\nSTORE = Store(str(DB_PATH))\n\n\ndef save_job(",
        ),
        "db_path=DB_PATH",
    ),
    "a text": (
        TEXT.replace("sqlite3.connect(DB_PATH, timeout=30)", 'sqlite3.connect("data/jobs.db")'),
        "db_path='data/jobs.db'",
    ),
}


@pytest.mark.parametrize("kind", DATABASES)
def test_the_database_that_the_service_uses_is_found(kind, tmp_path):
    content, expected = DATABASES[kind]
    file, _ = installed(tmp_path, content)
    assert f"lora_patch.start(app, get_mlx_model, {expected})" in file.read_text()


def test_a_database_can_be_named(tmp_path):
    file = tmp_path / "ai_advisor_service.py"
    for given, expected in (("OLD", "OLD"), ("data/jobs.db", "'data/jobs.db'"), ("jobs.db", "'jobs.db'")):
        file.write_text(REFUSED["two databases"][0])
        assert patch_command("install", "--service", file, "--db", given).returncode == 0
        assert f"db_path={expected})" in file.read_text()


def with_strategies(tmp_path: Path, strategy: str) -> Path:
    """A service whose view leaves the asking to a package of strategies beside it."""
    text = changed("        response = run_model_mlx(prompt, image_path=str(image_path))",
                   "        context = AnalysisContext()\n        context.set_strategy(mode, advisor)\n"
                   "        response = context.analyze(prompt, str(image_path))")  # fmt: skip
    package = tmp_path / "mondrian" / "strategies"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "context.py").write_text("from .base import Strategy\n\n\nclass AnalysisContext:\n    pass\n")
    (package / "base.py").write_text("class Strategy:\n    pass\n")
    (package / "lora.py").write_text(strategy)
    file = package.parent / "ai_advisor_service.py"
    file.write_text(
        text.replace("import mlx_vlm\n", "import mlx_vlm\nfrom mondrian.strategies.context import AnalysisContext\n", 1)
    )
    return file


def test_the_view_behind_a_package_of_strategies_is_found(tmp_path):
    file = with_strategies(tmp_path, "from mondrian.ai_advisor_service import run_model_mlx\n")
    done = patch_command("install", "--service", file)
    assert done.returncode == 0, done.stderr
    choose = "        context = AnalysisContext()\n"
    assert (
        "lora_patch.choose(job_id=job_id, advisor=advisor)\n    try:\n" in file.read_text()
        and choose in file.read_text()
    )


def test_a_model_that_is_loaded_and_asked_in_another_module_needs_no_line_for_it(tmp_path):
    file = with_strategies(tmp_path, "import mlx_vlm\n\nmodel = mlx_vlm.load\nmlx_vlm.generate()\n")
    file.write_text(
        file.read_text()
        .replace("mlx_vlm.generate(", "ask(")
        .replace("mlx_vlm.load(", "load(")
        .replace("run_model_mlx", "run_model")
    )
    before = file.read_text()
    done = patch_command("install", "--service", file)
    assert done.returncode == 0, done.stderr
    strategy = file.parent / "strategies" / "lora.py"
    assert f"note: the model is loaded in {strategy}: followed there at run time\n" in done.stdout
    assert f"note: the model is asked in {strategy}: followed there at run time\n" in done.stdout
    after = file.read_text()
    assert "lora_patch.choose(job_id=job_id, advisor=advisor)\n" in after and "lora_patch.generation" not in after
    again = patch_command("install", "--service", file)
    assert "installed already, nothing to do" in again.stdout and file.read_text() == after
    assert patch_command("install", "--service", file, "--uninstall").returncode == 0 and file.read_text() == before


def test_flags_are_known_before_a_module_loads_the_model_at_its_import(tmp_path):
    (tmp_path / "manager.py").write_text(
        "from mlx_vlm import load\n\n\nclass Manager:\n    def __init__(self):\n        self.loaded = load('x')\n\n\n"
        "manager = Manager()\n"
    )
    content = changed("import mlx_vlm\n", "import mlx_vlm\nfrom manager import manager\n")
    file, said = installed(tmp_path, content)
    assert "import lora_patch\nlora_patch.add_arguments()\nimport argparse\n" in file.read_text()
    assert "--help omits them" in said


WORKERS = {  # a view that only puts a job into a queue, and what takes it out -> the line there
    "dictionaries": (
        "work.put({'job_id': job_id, 'advisor': advisor, 'path': image_path, 'mode': mode})",
        "def worker():\n    while True:\n        job = work.get()\n        try:\n"
        "            run_model_mlx(job['advisor'], job['path'])\n        finally:\n            work.task_done()\n",
        "            lora_patch.choose(job_id=job['job_id'], advisor=job['advisor'], mode=job['mode'])\n"
        "            run_model_mlx(",
    ),
    "tuples": (
        "work.put((job_id, advisor, image_path))",
        "def worker():\n    while True:\n        job_id, advisor, path = work.get()\n"
        "        run_model_mlx(advisor, path)\n",
        "        lora_patch.choose(job_id=job_id, advisor=advisor)\n        run_model_mlx(advisor, path)\n",
    ),
    "a dataclass, and a function between": (
        "work.put(Work(job_id, advisor, image_path))",
        "class Work:\n    analysis_id: str\n    advisor: str\n    path: Path\n\n\ndef judge(one):\n"
        "    return run_model_mlx(one.advisor, one.path)\n\n\ndef worker():\n    for one in iter(work.get, None):\n"
        "        judge(one)\n",
        "    lora_patch.choose(job_id=one.analysis_id, advisor=one.advisor)\n    return run_model_mlx(one.advisor",
    ),
    "rows of the table, read again and again": (
        "None",
        "def judge(row):\n    return run_model_mlx(row['advisor'], row['filename']), row['id']\n\n\ndef poll():\n"
        "    while True:\n        for row in sqlite3.connect(DB_PATH).execute('SELECT * FROM jobs'):\n"
        "            judge(row)\n",
        "    lora_patch.choose(job_id=row['id'], advisor=row['advisor'])\n    return run_model_mlx(row['advisor']",
    ),
    "a thread class": (
        "work.put(advisor)",
        "class Worker(threading.Thread):\n    def run(self):\n        while True:\n            advisor = work.get()\n"
        "            run_model_mlx(advisor)\n\n\nworker = Worker()\n",
        "            lora_patch.choose(advisor=advisor)\n            run_model_mlx(advisor)\n",
    ),
}


@pytest.mark.parametrize("kind", WORKERS)
def test_the_worker_behind_a_queue_is_found(kind, tmp_path):
    put, worker, expected = WORKERS[kind]
    content = changed("response = run_model_mlx(prompt, image_path=str(image_path))", f"response = {put}")
    content = content.replace('if __name__ == "__main__":\n', f'{worker}\n\nif __name__ == "__main__":\n')
    file, _ = installed(tmp_path, content)
    assert expected in file.read_text() and file.read_text().count("lora_patch.choose(") == 1
    assert "lora_patch.carry" not in file.read_text()  # a worker outlives the request that started it
    assert patch_command("install", "--service", file, "--uninstall").returncode == 0
    assert file.read_text() == content


def test_a_view_in_another_module_is_noted(tmp_path):
    (tmp_path / "views.py").write_text("@bp.route('/analyze')\ndef analyze():\n    pass\n")
    content = changed('@app.route("/analyze"', '@app.route("/judge"').replace(
        "import mlx_vlm\n", "import mlx_vlm, views\n"
    )
    file, said = installed(tmp_path, content)
    assert f"note: the view of /analyze is in {tmp_path / 'views.py'}: the request's fields advisor and job_id" in said
    assert "lora_patch.choose" not in file.read_text()
