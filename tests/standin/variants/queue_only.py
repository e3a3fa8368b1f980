"""A service of the family: the view only queues the job, one worker answers; the model asked in a pool, with a limit."""

import argparse
import concurrent.futures
import dataclasses
import queue
import sqlite3
import threading

from flask import Flask, request
from mlx_vlm import generate, load
from mlx_vlm.prompt_utils import apply_chat_template

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, default=5100)
parser.add_argument("--mlx_model", default="mlx-community/Qwen3-VL-4B-Instruct-4bit")
parser.add_argument("--max_tokens", type=int, default=1500)
args = parser.parse_args()
DATABASE = "mondrian.db"


@dataclasses.dataclass
class AnalysisJob:
    job_id: str
    advisor: str
    image: str
    mode: str = "baseline"


class Worker(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.jobs = queue.Queue()
        self.pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self.model = self.processor = None

    def run(self):
        while (job := self.jobs.get()) is not None:
            try:
                self.finish(job, "completed", self.analyze(job))
            except Exception as error:
                self.finish(job, "error", str(error))

    def finish(self, job, status, text):
        with sqlite3.connect(DATABASE, timeout=30) as db:
            row = (status, text, job.job_id)
            db.execute("UPDATE jobs SET status = ?, analysis_markdown = ? WHERE id = ?", row)

    def analyze(self, job):
        if self.model is None:
            self.model, self.processor = load(args.mlx_model)
        prompt = apply_chat_template(self.processor, self.model.config, full_prompt(job.advisor), num_images=1)
        settings = {"image": [job.image], "max_tokens": args.max_tokens, "temperature": 0.0}
        return self.pool.submit(generate, self.model, self.processor, prompt, **settings).result(timeout=300).text


def full_prompt(advisor):
    with sqlite3.connect(DATABASE) as db:
        system = db.execute("SELECT value FROM config WHERE key = 'system_prompt'").fetchone()[0]
        own = db.execute("SELECT prompt FROM advisors WHERE id = ?", (advisor,)).fetchone()[0]
    return f"{system.replace('<AdvisorName>', advisor)}\n\n{own}\n\nAnalyze the provided image."


def create_app(worker):
    app = Flask(__name__)

    @app.get("/health")
    def health():
        return {"queued": worker.jobs.qsize()}

    @app.post("/analyze")
    def analyze():
        fields, path = request.form, f"{request.form['job_id']}.jpg"
        request.files["image"].save(path)
        with sqlite3.connect(DATABASE, timeout=30) as db:
            row = (fields["job_id"], fields["advisor"])
            db.execute("INSERT INTO jobs (id, advisor, status) VALUES (?, ?, 'queued')", row)
        mode = fields.get("mode", "baseline")
        worker.jobs.put(AnalysisJob(fields["job_id"], fields["advisor"], path, mode))
        return {"job_id": fields["job_id"], "status": "queued"}, 202

    return app


if __name__ == "__main__":
    worker = Worker()
    worker.start()
    create_app(worker).run(host="127.0.0.1", port=args.port, threaded=True)
