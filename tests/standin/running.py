"""For the tests of integration/: adapters made directly, a service as a real process, requests over real HTTP."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import mlx.core as mx

from common.files import write_json
from common.release.promotion import new_record
from common.training.adapter_files import adapter_config, write_adapter
from integration.lora_patch.fingerprint import base_fingerprint
from integration.lora_patch.versions import record_path
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "integration" / "lora_patch"
STANDIN = ROOT / "tests" / "standin" / "ai_advisor_service.py"
MODULES = ROOT / "tests" / "standin" / "modules"
VARIANTS = sorted((ROOT / "tests" / "standin" / "variants").glob("*.py"))


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Return (in, out) of the target modules of a model folder's language model."""
    text = json.loads((base / "config.json").read_text())["text_config"]
    hidden, middle = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    one = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, middle),
        "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }
    layers = range(text["num_hidden_layers"])
    return {f"language_model.model.layers.{n}.{module}": shape for n in layers for module, shape in one.items()}


def random_lora(base: Path, seed: int, rank: int = 4, size: float = 0.3) -> dict[str, mx.array]:
    """Return LoRA matrices strong enough that a tiny model answers quite differently with them."""
    mx.random.seed(seed)
    tensors = {}
    for module, (inputs, outputs) in linear_shapes(base).items():
        tensors[f"{module}.lora_a"] = size * mx.random.normal((inputs, rank))
        tensors[f"{module}.lora_b"] = size * mx.random.normal((rank, outputs))
    return tensors


def make_adapter(folder: Path, base: Path, seed: int, rank: int = 4, alpha: float = 8, size: float = 0.3) -> Path:
    """Write an adapter folder as training does: both readers' files and training_args.json."""
    tensors = random_lora(base, seed, rank, size)
    config = adapter_config(str(base), sorted({name.rsplit(".", 1)[0] for name in tensors}), rank, alpha, 0.05)
    write_adapter(folder, tensors, config)
    trained = {"base_fingerprint": base_fingerprint(base, str(base)), "settings": {"max_image_size": 1024}}
    (folder / "training_args.json").write_text(json.dumps(trained))
    return folder


def deploy(models: Path, advisor: str, *numbers: int) -> None:
    """Write models/ADVISOR/deployed.json as promoting these versions one after another does."""
    history: list[dict] = []
    for number in numbers:
        record = new_record(models, advisor, number, {"report": None}, history)
        history = [{key: value for key, value in record.items() if key != "history"}, *history]
    (models / advisor).mkdir(exist_ok=True)
    write_json(record_path(models, advisor), record)


def patch_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(PATCH), *map(str, arguments)], capture_output=True, text=True)


OLDEST = "CREATE TABLE jobs (id TEXT PRIMARY KEY, filename TEXT, advisor TEXT, status TEXT, analysis_markdown TEXT)"


def make_db(path: Path, schema: str = OLDEST, rows: int = 3) -> Path:
    path.parent.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(schema)
        for number in range(rows):
            db.execute("INSERT INTO jobs (id, status) VALUES (?, 'done')", (f"j{number}",))
    return path


class RunningService:
    """A service, copied into a folder of its own with a database, running as a process.

    ``source`` is its file; one in a folder of several modules (MODULES) is copied with them. ``environment`` is added.
    """

    def __init__(
        self, folder: Path, source: Path, database: Path, *flags: str, installed: bool = True, environment=None
    ):
        folder.mkdir(parents=True)
        if source.parent == MODULES:
            shutil.copytree(MODULES, folder, dirs_exist_ok=True)
        self.environment = environment or {}
        self.folder, self.port = folder, free_port()
        self.file = folder / source.name
        shutil.copy(source, self.file)
        with sqlite3.connect(database) as old, sqlite3.connect(folder / "mondrian.db") as new:
            old.backup(new)
        if installed:
            done = patch_command("install", "--service", str(self.file))
            assert done.returncode == 0, done.stderr
        self.start(*flags)

    def start(self, *flags: str) -> None:
        self.log = open(self.folder / "log.txt", "a")  # noqa: SIM115 - it lives as long as the process
        port = [] if self.environment else ["--port", str(self.port)]
        command = [sys.executable, self.file.name, *port, *map(str, flags)]
        # matrices of a tiny model are too small to be worth a second thread, which only waits in spinning
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1", "PORT": str(self.port)}
        environment |= {name: str(value) for name, value in self.environment.items()}
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=self.log, stderr=subprocess.STDOUT, env=environment
        )

    def wait(self, seconds: float = 60) -> "RunningService":
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}:\n{self.said()}")
            try:
                self.get("/health")
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no answer within {seconds} s:\n{self.said()}")

    def said(self) -> str:
        return (self.folder / "log.txt").read_text()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()

    def call(self, request) -> tuple[int, dict, bytes]:
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, dict(reply.headers), reply.read()
        except urllib.error.HTTPError as reply:
            return reply.code, dict(reply.headers), reply.read()

    def get(self, path: str) -> dict:
        return json.loads(self.call(f"http://127.0.0.1:{self.port}{path}")[2])

    def post(
        self, path: str, headers: dict | None = None, host: str = "127.0.0.1", **fields
    ) -> tuple[int, dict, bytes]:
        """Send a multipart form; a Path is sent as a file."""
        boundary, parts = uuid.uuid4().hex, []
        for name, value in fields.items():
            file = f'; filename="{value.name}"' if isinstance(value, Path) else ""
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
            parts.append(head.encode() + (value.read_bytes() if file else str(value).encode()))
        body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", **(headers or {})}
        return self.call(urllib.request.Request(f"http://{host}:{self.port}{path}", body, headers))

    def analyze(self, photo: Path, advisor: str, job_id: str, **more) -> tuple[dict, dict]:
        """Return (response headers, response object) of an analysis that must succeed."""
        status, headers, body = self.post("/analyze", image=photo, advisor=advisor, job_id=job_id, **more)
        assert status in (200, 202), (status, body)
        return headers, json.loads(body)

    def rows(self, columns: str) -> dict:
        with sqlite3.connect(self.folder / "mondrian.db") as db:
            return {row[0]: row[1:] for row in db.execute(f"SELECT id, {columns} FROM jobs")}
