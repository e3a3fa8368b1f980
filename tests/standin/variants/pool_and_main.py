#!/usr/bin/env python3
"""A service of the family: parser and app.run in main(), typed functions, a thread pool with a time limit, streaming."""

from __future__ import annotations

import argparse
import functools
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

from flask import Flask, jsonify, request
from mlx_vlm import load
from mlx_vlm import stream_generate as stream
from mlx_vlm.prompt_utils import apply_chat_template

app = Flask(__name__)
settings: argparse.Namespace
executor = ThreadPoolExecutor(max_workers=4)
_cache: dict = {}


def timed(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        started = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            app.logger.info("%s took %.1f s", function.__name__, time.time() - started)

    return inner


def get_mlx_model() -> tuple:
    if "model" not in _cache:
        _cache["model"], _cache["processor"] = load(
            settings.mlx_model,
        )
    return _cache["model"], _cache["processor"]


@timed
def run_model_mlx(full_prompt: str, image_path: Optional[str] = None, *, temperature: float = 0.0) -> str:
    model, processor = get_mlx_model()
    text = apply_chat_template(processor, model.config, full_prompt, num_images=int(image_path is not None))
    pieces = []
    for piece in stream(
        model, processor, text, image=[image_path], max_tokens=settings.max_tokens, temperature=temperature
    ):
        pieces.append(piece.text)
    return "".join(pieces)


@app.get("/health")
def health():
    return jsonify(status="ok")


@app.post("/analyze")
def analyze_photo():
    who = (request.form.get("advisor") or "ansel").lower()
    jid = request.form.get("job_id", "")
    with tempfile.NamedTemporaryFile(suffix=".jpg") as upload:
        request.files["image"].save(upload.name)
        connection = sqlite3.connect("mondrian.db")
        system, = connection.execute("SELECT value FROM config WHERE key = 'system_prompt'").fetchone()
        own, = connection.execute("SELECT prompt FROM advisors WHERE id = ?", (who,)).fetchone()
        connection.close()
        prompt = f"{system.replace('<AdvisorName>', who)}\n\n{own}\n\nAnalyze the provided image."
        future = executor.submit(run_model_mlx, prompt, upload.name)
        answer = future.result(timeout=settings.model_timeout)
    return jsonify(job_id=jid, response=answer)


def main() -> None:
    global settings
    cli = argparse.ArgumentParser()
    cli.add_argument("--port", type=int, default=5100)
    cli.add_argument("--model_timeout", type=float, default=120)
    cli.add_argument("--mlx_model", default="mlx-community/Qwen3-VL-4B-Instruct-4bit")
    cli.add_argument("--max_tokens", type=int, default=1500)
    settings, _unknown = cli.parse_known_args()
    app.run("127.0.0.1", settings.port, threaded=True, debug=False)


if __name__ == "__main__":
    main()
