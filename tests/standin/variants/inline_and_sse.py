"""A service of the family: the model loaded at import, generation inside the view, and a second view that streams."""

import argparse
import sqlite3
import threading

import mlx_vlm
from flask import Flask, Response, jsonify, request
from mlx_vlm import generate, stream_generate

options = argparse.ArgumentParser()
options.add_argument("--port", type=int, default=5100)
options.add_argument("--mlx_model", default="mlx-community/Qwen3-VL-4B-Instruct-4bit")
options.add_argument("--max_tokens", type=int, default=1500)
args = options.parse_args()
MODEL, PROCESSOR = mlx_vlm.load(args.mlx_model)
app = Flask(__name__)
busy = threading.Lock()


def full_prompt(advisor):
    with sqlite3.connect("mondrian.db") as db:
        system = db.execute("SELECT value FROM config WHERE key = 'system_prompt'").fetchone()[0]
        own = db.execute("SELECT prompt FROM advisors WHERE id = ?", (advisor,)).fetchone()[0]
    return f"{system.replace('<AdvisorName>', advisor)}\n\n{own}\n\nAnalyze the provided image."


def formatted(advisor):
    return mlx_vlm.apply_chat_template(PROCESSOR, MODEL.config, full_prompt(advisor), num_images=1)


@app.route("/health")
def health():
    return jsonify(ok=True)


@app.route("/analyze", methods=["POST"])
def analyze():
    advisor: str = request.values["advisor"]
    path = f"{threading.get_ident()}.jpg"
    request.files["image"].save(path)
    with busy:
        result = generate(
            MODEL, PROCESSOR, formatted(advisor), image=path, max_tokens=args.max_tokens, temperature=0.0, verbose=False
        )
    return jsonify(response=result.text, job_id=request.values.get("job_id"))


def run_model_mlx(prompt, image):
    with busy:
        for piece in stream_generate(MODEL, PROCESSOR, prompt, image, max_tokens=args.max_tokens, temperature=0.0):
            yield piece.text


@app.route("/analyze_stream", methods=["POST"])
def analyze_stream():
    advisor, job = request.values["advisor"], request.values.get("job_id")
    path = f"{threading.get_ident()}.jpg"
    request.files["image"].save(path)

    def events():
        for text in run_model_mlx(formatted(advisor), path):
            yield text

    return Response(events(), mimetype="text/plain", headers={"X-Job": str(job)})


if __name__ == "__main__":
    from wsgiref.simple_server import make_server

    make_server("127.0.0.1", args.port, app).serve_forever()
