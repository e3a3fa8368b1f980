#!/usr/bin/env python3
"""AI Advisor Service: judges a photograph as one of its advisors.

    python ai_advisor_service.py --port 5100 --mlx_model mlx-community/Qwen3-VL-4B-Instruct-4bit

A small, faithful stand-in of Mondrian's service for the tests of integration/: the same flags, globals, functions,
routes and jobs table. It knows nothing of adapters; `lora_patch install` has to find its way in it by itself.
Reads and writes mondrian.db and uploads/ in the working directory.
"""

import argparse
import contextlib
import json
import logging
import re
import sqlite3
import threading
import time
import urllib.request
import uuid
from datetime import datetime
from pathlib import Path

import mlx_vlm
from flask import Flask, jsonify, request
from mlx_vlm.prompt_utils import apply_chat_template

logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)s] %(message)s")
logger = logging.getLogger("ai_advisor_service")

parser = argparse.ArgumentParser(description="AI Advisor Service")
parser.add_argument("--port", type=int, default=5100, help="Port to listen on")
parser.add_argument("--job_service_url", default="http://127.0.0.1:5005", help="Where progress is reported")
parser.add_argument("--model_timeout", type=int, default=300, help="Seconds that one analysis may take")
parser.add_argument("--mlx_model", default="mlx-community/Qwen3-VL-4B-Instruct-4bit", help="Model folder or hub id")
parser.add_argument("--rag_service_url", default="http://127.0.0.1:5400", help="Where similar photographs are found")
parser.add_argument("--max_tokens", type=int, default=1500, help="Longest answer")
args = parser.parse_args()

PORT = args.port
JOB_SERVICE_URL = args.job_service_url
MODEL_TIMEOUT = args.model_timeout
MLX_MODEL = args.mlx_model
RAG_SERVICE_URL = args.rag_service_url
DB_PATH = "mondrian.db"
UPLOADS = Path("uploads")

ADVISORS = ["ansel", "cunningham", "gehry", "gilpin", "mondrian", "okeefe", "vangogh", "watkins", "weston"]

app = Flask(__name__)

_mlx_model = None
_mlx_processor = None
_model_lock = threading.Lock()


def get_mlx_model():
    """Load the model at first use and keep it."""
    global _mlx_model, _mlx_processor
    with _model_lock:
        if _mlx_model is None:
            started = time.time()
            logger.info("Loading MLX model: %s", MLX_MODEL)
            _mlx_model, _mlx_processor = mlx_vlm.load(MLX_MODEL)
            logger.info("Model loaded in %.1f s", time.time() - started)
    return _mlx_model, _mlx_processor


_generation_lock = threading.Lock()


def run_model_mlx(full_prompt, image_path=None):
    """Ask the model; returns its answer as text."""
    model, processor = get_mlx_model()
    formatted = apply_chat_template(processor, model.config, full_prompt, num_images=1 if image_path else 0)
    images = [image_path] if image_path else None
    with _generation_lock:
        output = mlx_vlm.generate(
            model, processor, formatted, image=images, max_tokens=args.max_tokens, temperature=0.0, verbose=False
        )
    return output.text


def get_prompts(advisor):
    """Return (system prompt, the advisor's prompt) from the database."""
    connection = sqlite3.connect(DB_PATH)
    try:
        system = connection.execute("SELECT value FROM config WHERE key = 'system_prompt'").fetchone()
        own = connection.execute("SELECT prompt FROM advisors WHERE id = ?", (advisor,)).fetchone()
    finally:
        connection.close()
    return (system[0] if system else ""), (own[0] if own and own[0] else "")


def build_full_prompt(advisor, rag_context=""):
    system_prompt, advisor_prompt = get_prompts(advisor)
    prompt = system_prompt.replace("<AdvisorName>", advisor)
    return f"{prompt}\n\n{advisor_prompt}{rag_context}\n\nAnalyze the provided image."


def get_rag_context(image_path):
    try:
        with urllib.request.urlopen(f"{RAG_SERVICE_URL}/similar?path={image_path}", timeout=2) as reply:
            return "\n\nSimilar photographs: " + reply.read().decode()
    except OSError as error:
        logger.warning("RAG service unavailable: %s", error)
        return ""


def notify_job_service(job_id, status):
    body = json.dumps({"status": status}).encode()
    call = urllib.request.Request(f"{JOB_SERVICE_URL}/job/{job_id}/status", body, {"Content-Type": "application/json"})
    with contextlib.suppress(OSError):  # the job service need not run
        urllib.request.urlopen(call, timeout=2).close()


def parse_response(text):
    """Return the analysis in the model's answer, or None."""
    match = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        return json.loads(match.group(0)) if match else None
    except ValueError:
        return None


def save_job(job_id, status, **columns):
    columns = {"status": status, "last_activity": datetime.now().isoformat(), **columns}
    connection = sqlite3.connect(DB_PATH, timeout=30)
    try:
        with connection:
            connection.execute("INSERT OR IGNORE INTO jobs (id, status) VALUES (?, ?)", (job_id, status))
            names = ", ".join(f"{name} = ?" for name in columns)
            connection.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*columns.values(), job_id))
    finally:
        connection.close()


@app.route("/health", methods=["GET"])
def health():
    return jsonify(
        {
            "status": "UP",
            "service": "ai_advisor_service",
            "model": MLX_MODEL,
            "model_loaded": _mlx_model is not None,
            "advisors": ADVISORS,
        }
    )


@app.route("/analyze", methods=["POST"])
def analyze():
    if "image" not in request.files:
        return jsonify({"error": "No image provided"}), 400
    advisor = request.form.get("advisor", "ansel")
    if advisor not in ADVISORS:
        return jsonify({"error": f"Unknown advisor: {advisor}"}), 400
    mode = request.form.get("mode", "baseline")
    enable_rag = request.form.get("enable_rag", "false").lower() == "true"
    job_id = request.form.get("job_id") or str(uuid.uuid4())

    image = request.files["image"]
    UPLOADS.mkdir(exist_ok=True)
    image_path = UPLOADS / f"{uuid.uuid4()}_{Path(image.filename or 'photo.jpg').name}"
    image.save(image_path)

    save_job(job_id, "processing", filename=str(image_path), advisor=advisor, mode=mode, enable_rag=int(enable_rag))
    notify_job_service(job_id, "processing")
    try:
        rag_context = get_rag_context(image_path) if enable_rag else ""
        prompt = build_full_prompt(advisor, rag_context)
        response = run_model_mlx(prompt, image_path=str(image_path))
    except Exception as error:
        logger.exception("Analysis failed")
        save_job(job_id, "error", error=str(error))
        return jsonify({"error": str(error), "job_id": job_id}), 500

    analysis = parse_response(response)
    summary = analysis.get("image_description", "") if analysis else "Unable to parse response"
    markdown = f"# {advisor.title()} Analysis\n\n## Summary\n{summary}\n\n## Full Analysis\n{response}"
    outputs = {"prompt": prompt, "response": response, "summary": summary, "model": MLX_MODEL}
    save_job(
        job_id,
        "completed",
        prompt=prompt,
        analysis_markdown=markdown,
        llm_outputs=json.dumps(outputs),
        llm_thinking=response,
        current_step="Analysis complete",
        progress_percentage=100,
    )
    notify_job_service(job_id, "completed")
    return jsonify({"job_id": job_id, "advisor": advisor, "mode": mode, "analysis": analysis, "response": response})


if __name__ == "__main__":
    logger.info("AI Advisor Service on port %d with %s", PORT, MLX_MODEL)
    app.run(host="127.0.0.1", port=PORT, threaded=True)
